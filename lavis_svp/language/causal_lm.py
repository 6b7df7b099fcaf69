"""A Hugging Face causal language model with one added token, ``[SEG]``, and a choice of the parameters to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lavis_svp.language.prompts import IGNORE, SEG_TOKEN
from lavis_svp.language.splice import SplicedBatch
from lavis_svp.zoo import Weights, model_config, resolve

TUNINGS = ("full", "lora", "frozen")
EMBEDDINGS = ("all", "added")


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters through peft; defaults are GLaMM's and LISA's.

    Args:
        r: rank.
        alpha: scale times rank.
        dropout: dropout before the adapter.
        target_modules: names of the linear layers that get one.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class LanguageOptions:
    """The language model.

    Args:
        name: zoo name, local folder or hub id.
        num_layers: keep only the first layers (None = all); a cut model, for CPUs, is not in the paper.
        tuning: ``full``, ``lora`` or ``frozen``: what of the transformer trains.
        train_embeddings: ``all`` (GLaMM: input embeddings and output layer whole) or ``added`` (only the row of
            ``[SEG]`` in the input embeddings, and in the output layer where that is not tied to them).
        lora: read when ``tuning`` is ``lora``.
        max_length: longest sequence in positions; None = what the model's configuration says.
        max_turn_tokens: longest question with its answer, in tokens.
        max_new_tokens: longest generated answer.
        gradient_checkpointing: trade compute for memory in training.
        embedding_std: scale that visual tokens should have; None = standard deviation of the input embeddings. An
            exported model, whose embeddings have been trained, names the one it was trained with.
    """

    REMOVED_KEYS: ClassVar = {"visual_positions": "index"}
    name: str = "smollm2_135m_instruct"
    num_layers: int | None = None
    tuning: str = "lora"
    train_embeddings: str = "all"
    lora: LoraOptions = field(default_factory=LoraOptions)
    max_length: int | None = None
    max_turn_tokens: int = 256
    max_new_tokens: int = 16
    gradient_checkpointing: bool = False
    embedding_std: float | None = None

    def __post_init__(self) -> None:
        if self.tuning not in TUNINGS:
            raise ValueError(f"model.language.tuning is '{self.tuning}'; known: {', '.join(TUNINGS)}.")
        if self.train_embeddings not in EMBEDDINGS:
            raise ValueError(
                f"model.language.train_embeddings is '{self.train_embeddings}'; known: {', '.join(EMBEDDINGS)}."
            )


def load_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, bool]:
    """Load a tokenizer, add ``[SEG]`` unless it is there, and check that it is one id that survives a round trip.

    Args:
        name: zoo name, local folder or hub id.

    Returns:
        The tokenizer, and whether it had ``[SEG]`` before: then the model's tables hold a trained row for it.

    Raises:
        ValueError: the tokenizer splits ``[SEG]`` or does not give it back (a known cause of blank masks in peers).
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    knew = SEG_TOKEN in tokenizer.get_vocab()
    if not knew:
        tokenizer.add_tokens([AddedToken(SEG_TOKEN, lstrip=False, rstrip=False, normalized=False, special=False)])
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    ids = tokenizer(f"It is {SEG_TOKEN}.", add_special_tokens=False)["input_ids"]
    if ids.count(seg_id) != 1 or SEG_TOKEN not in tokenizer.decode(ids):
        raise ValueError(
            f"The tokenizer of '{name}' does not keep {SEG_TOKEN} as one token: id {seg_id}, text became {ids}, "
            f"which reads '{tokenizer.decode(ids)}'."
        )
    return tokenizer, knew


class LanguageModel(nn.Module):
    """A decoder-only language model split into what the splice needs: embed, run, predict.

    The row of ``[SEG]`` is a parameter of its own (``added_embedding``, and ``added_output`` when the output layer is
    not tied to the input), so that the pretrained vocabulary can stay frozen while ``[SEG]`` learns. It starts from
    the tables' mean, or, where the files' tokenizer knows ``[SEG]`` (an exported model), from the tables' own row.

    Args:
        options: which model, and which of its parameters are trained.
        weights: "none" builds it on the meta device from its configuration alone; there is then no tokenizer, and
            ``[SEG]`` is the id after the vocabulary.

    Attributes:
        dim: D, the width.
        seg_id: id of ``[SEG]``.
        vocabulary: number of ids the model can say; tables may be padded beyond it.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, options: LanguageOptions, weights: Weights = "load") -> None:
        super().__init__()
        self.options = options
        knew_seg = False
        if weights == "load":
            self.tokenizer, knew_seg = load_tokenizer(options.name)
            model = AutoModelForCausalLM.from_pretrained(resolve(options.name), dtype=torch.float32)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(model_config(options.name))
        if options.num_layers is not None:
            _cut_layers(model, options.num_layers)
        self.config = model.config
        self.dim: int = model.config.hidden_size
        self.seg_id: int = (
            self.tokenizer.convert_tokens_to_ids(SEG_TOKEN) if weights == "load" else model.config.vocab_size
        )
        self.vocabulary: int = 1 + max(self.tokenizer.get_vocab().values()) if weights == "load" else self.seg_id + 1
        self.max_length: int = options.max_length or model.config.max_position_embeddings
        self.embed_tokens: nn.Embedding = model.get_input_embeddings()
        tied = model.get_output_embeddings().weight is self.embed_tokens.weight
        self.output: nn.Linear | None = None if tied else model.get_output_embeddings()
        mean_row = self.embed_tokens.weight.data[: self.seg_id].mean(0, keepdim=True)
        own_row = slice(self.seg_id, self.seg_id + 1)
        first_row = self.embed_tokens.weight.data[own_row] if knew_seg else mean_row
        self.added_embedding = nn.Parameter(first_row.clone())  # (1, D)
        self.added_output = None
        if self.output is not None:
            table = self.output.weight.data
            self.added_output = nn.Parameter(table[own_row].clone() if knew_seg else table.mean(0, keepdim=True))
        self.transformer: PreTrainedModel = model.model
        self.transformer.set_input_embeddings(nn.Identity())  # the table is kept once, here
        self._set_trainable(options)

    def _set_trainable(self, options: LanguageOptions) -> None:
        self.transformer.requires_grad_(options.tuning == "full")
        if options.tuning == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            lora = options.lora
            config = LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.target_modules),
                bias="none",
            )
            self.transformer = inject_adapter_in_model(config, self.transformer)
        train_all = options.train_embeddings == "all"
        self.embed_tokens.requires_grad_(train_all)
        if self.output is not None:
            self.output.requires_grad_(train_all)
        if options.gradient_checkpointing:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the pretrained input embeddings: the scale visual tokens should have."""
        if self.options.embedding_std is not None:
            return self.options.embedding_std
        if self.embed_tokens.weight.is_meta:  # built without weights: what they start from
            return float(self.config.initializer_range)
        return float(self.embed_tokens.weight.detach()[: self.seg_id].std())

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids (any shape) -> (..., D); negative ids are read as 0."""
        base = self.embed_tokens(ids.clamp(0, self.embed_tokens.num_embeddings - 1))
        return torch.where((ids == self.seg_id)[..., None], self.added_embedding[0], base)

    def read(self, batch: SplicedBatch, visual: Tensor, cache: object = None) -> Tensor:
        """Read sequences in which visual tokens stand among words.

        Args:
            batch: R sequences of L positions, see :func:`~lavis_svp.language.splice.splice`.
            visual: (B, T, D) visual tokens.
            cache: an empty transformers ``Cache`` to fill, or None.

        Returns:
            (R, L, D) states of the last layer after the final norm.
        """
        embeddings = batch.embeddings(self.embed(batch.ids), visual)  # (R, L, D)
        return self(embeddings, batch.attention_mask(embeddings.dtype), batch.positions, cache)

    def forward(self, embeddings: Tensor, attention_mask: Tensor, positions: Tensor, cache: object = None) -> Tensor:
        """Run the transformer on embeddings.

        Args:
            embeddings: (R, L, D).
            attention_mask: (R, 1, L, L_total) additive.
            positions: (R, L).
            cache: a transformers ``Cache`` to read and extend, or None.

        Returns:
            (R, L, D) states of the last layer after the final norm.
        """
        return self.transformer(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """(P, D) states -> (P, V) scores of the next token, V = ``vocabulary``; ``[SEG]`` is at its id."""
        table = self.embed_tokens.weight if self.output is None else self.output.weight
        row = self.added_embedding if self.added_output is None else self.added_output
        scores = [F.linear(states, table[: self.seg_id]), F.linear(states, row)]  # (P, seg_id), (P, 1)
        if self.vocabulary > self.seg_id + 1:  # a tokenizer that had [SEG] may have tokens after it
            scores.append(F.linear(states, table[self.seg_id + 1 : self.vocabulary]))
        return torch.cat(scores, dim=-1).float()  # (P, V)

    def loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of next-token prediction, computed at supervised positions only.

        Args:
            states: (R, L, D).
            labels: (R, L) ids aligned with the inputs (not shifted), ``IGNORE`` where unsupervised.

        Returns:
            scalar mean over supervised tokens.
        """
        target = labels[:, 1:]
        keep = target != IGNORE
        return F.cross_entropy(self.logits(states[:, :-1][keep]), target[keep])


def _cut_layers(model: PreTrainedModel, count: int) -> None:
    layers = model.model.layers
    if not 1 <= count <= len(layers):
        raise ValueError(f"model.language.num_layers is {count}; the model has {len(layers)} layers.")
    model.model.layers = layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):  # Qwen's say which layers see a window only
        model.config.layer_types = model.config.layer_types[:count]
