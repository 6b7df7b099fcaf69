"""A Hugging Face causal language model with one added token, ``[SEG]``, and a choice of the parameters to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lavis_svp.common.devices import DtypeName, check_dtype, resolve_dtype
from lavis_svp.common.files import BadFileError, file_errors
from lavis_svp.common.tensors import no_autocast
from lavis_svp.language.prompts import SEG_TOKEN
from lavis_svp.language.splice import SplicedBatch
from lavis_svp.zoo import Weights, load_published, model_config, read_published, resolve

TUNINGS = ("full", "lora", "frozen")
EMBEDDINGS = ("all", "added")
ATTENTION = ("auto", "sdpa", "eager")
"""No ``flash_attention_2``: it takes no mask but a causal one with padding, and the layouts' 4-D masks let a turn see
the image and itself only."""
QUANTIZATION = ("none", "8bit", "4bit")


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
        max_length: longest sequence in positions; None = what the model's configuration says. In training, the last
            turns of a conversation that is longer are left out, with their masks.
        max_turn_tokens: longest question with its answer, in tokens. In training, the end of a longer one is cut, as
            LLaVA does, never a ``[SEG]``; in prediction it is an error.
        max_new_tokens: longest generated answer.
        gradient_checkpointing: trade compute for memory in training.
        embedding_std: scale that visual tokens should have; None = standard deviation of the input embeddings. An
            exported model, whose embeddings have been trained, names the one it was trained with.
        dtype: number type of the weights that do not train: ``auto`` (float32 on a CPU, bfloat16 on CUDA), ``float32``,
            ``bfloat16`` or ``float16``. What trains (adapters, the rows of ``[SEG]``, tables, a transformer that is
            tuned in full) is float32, for mixed precision or masters of its own.
        attn_implementation: ``auto`` (what transformers chooses), ``sdpa`` or ``eager``.
        quantization: ``none``, ``8bit`` or ``4bit`` (NF4): the transformer's matrices through bitsandbytes, which has
            to be installed; adapters train on top of them (QLoRA). The tables stay as they are.
        device_map: how to spread the model over devices, for inference: None, or what accelerate takes, ``auto`` or a
            mapping of modules to devices.
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
    dtype: DtypeName = "auto"
    attn_implementation: str = "auto"
    quantization: str = "none"
    device_map: Any = None

    def __post_init__(self) -> None:
        known = {
            "tuning": TUNINGS,
            "train_embeddings": EMBEDDINGS,
            "attn_implementation": ATTENTION,
            "quantization": QUANTIZATION,
        }
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise ValueError(f"model.language.{key} is '{getattr(self, key)}'; known: {', '.join(values)}.")
        check_dtype("model.language.dtype", self.dtype)
        if self.quantization != "none" and self.tuning == "full":
            raise ValueError(
                f"model.language.quantization is {self.quantization}, and quantised weights cannot be tuned in full: "
                "set model.language.tuning to lora or frozen."
            )
        if self.device_map is not None and not isinstance(self.device_map, str | Mapping):
            raise ValueError(f"model.language.device_map is {self.device_map!r}; it must be null, auto or a mapping.")


def load_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, bool]:
    """Load a tokenizer, add ``[SEG]`` unless it is there, and check that it is one id that survives a round trip.

    Args:
        name: zoo name, local folder or hub id.

    Returns:
        The tokenizer, and whether it had ``[SEG]`` before: then the model's tables hold a trained row for it.

    Raises:
        BadFileError: see :func:`~lavis_svp.zoo.published.read_published`; or the tokenizer splits ``[SEG]`` or does not
            give it back (a known cause of blank masks in peers).
    """
    tokenizer = read_published(AutoTokenizer.from_pretrained, resolve(name))
    with file_errors(f"The tokenizer of '{name}'"):
        return _with_seg_token(tokenizer, name)


def _with_seg_token(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[PreTrainedTokenizerBase, bool]:
    knew = SEG_TOKEN in tokenizer.get_vocab()
    if not knew:
        tokenizer.add_tokens([AddedToken(SEG_TOKEN, lstrip=False, rstrip=False, normalized=False, special=False)])
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    ids = tokenizer(f"It is {SEG_TOKEN}.", add_special_tokens=False)["input_ids"]
    if ids.count(seg_id) != 1 or SEG_TOKEN not in tokenizer.decode(ids):
        raise BadFileError(
            f"The tokenizer of '{name}' does not keep {SEG_TOKEN} as one token: id {seg_id}, text became {ids}, "
            f"which reads '{tokenizer.decode(ids)}'."
        )
    return tokenizer, knew


class ExactRotary(nn.Module):
    """A model's rotary embedding with angles of whole float32 products, also where TF32 is on.

    transformers multiplies frequencies and positions as matrices, outside of autocast, but TF32 still reaches them: it
    keeps 11 binary digits of a position, and the angle at position 500 would be off by 0.1 radian.

    Args:
        rotary: transformers' module, with ``inv_freq``.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute cosine and sine of the angles, each (R, L, d) in the number type of ``states`` (R, L, D)."""
        angles = self.without_tf32 if states.device.type == "cuda" else self.rotary
        return angles(states, *args, **kwargs)

    def without_tf32(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute them on CUDA; see :meth:`forward`."""
        with no_autocast(states.device):
            return self.rotary(states, *args, **kwargs)


class LanguageModel(nn.Module):
    """A decoder-only language model split into what the splice needs: embed, run, predict.

    The row of ``[SEG]`` is a parameter of its own (``added_embedding``, and ``added_output`` when the output layer is
    not tied to the input), so that the pretrained vocabulary can stay frozen while ``[SEG]`` learns. It starts from
    the tables' mean, or, where the files' tokenizer knows ``[SEG]`` (an exported model), from the tables' own row.

    Args:
        options: which model, and which of its parameters are trained.
        weights: "none" builds it on the meta device from its configuration alone; there is then no tokenizer, and
            ``[SEG]`` is the id after the vocabulary. Nothing is quantised then.
        device: where it is going to run, which decides what ``dtype: auto`` means, and where quantised weights are
            put; None = CUDA where there is one.

    Attributes:
        dim: D, the width.
        seg_id: id of ``[SEG]``.
        vocabulary: number of ids the model can say; tables may be padded beyond it.

    Raises:
        ModuleNotFoundError: ``quantization`` is on and bitsandbytes is not installed.
        ValueError: ``num_layers`` does not fit the model, or ``device_map`` offloads one of its tables.
        BadFileError: see :func:`~lavis_svp.zoo.published.load_published`; or the tokenizer has words that the model's
            table lacks.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self, options: LanguageOptions, weights: Weights = "load", device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.options = options
        dtype = resolve_dtype(options.dtype, device)
        knew_seg = False
        if weights == "load":
            settings = _loading_settings(options, dtype, device)
            self.tokenizer, knew_seg = load_tokenizer(options.name)
            model = load_published(AutoModelForCausalLM, resolve(options.name), **settings)
        else:
            with torch.device("meta"):
                config = model_config(options.name)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
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
        if weights == "load":
            _check_tables_are_here(self.embed_tokens, self.output)
            words_of_files = self.vocabulary if knew_seg else self.seg_id
            if words_of_files > self.embed_tokens.num_embeddings:
                raise BadFileError(
                    f"The tokenizer of '{options.name}' has ids up to {words_of_files - 1}, but the model's table has "
                    f"{self.embed_tokens.num_embeddings} rows: they do not belong together. Fetch them again."
                )
        own_row = self.seg_id if knew_seg else None
        words = self.embed_tokens.weight if knew_seg else self.embed_tokens.weight[: self.seg_id]  # none of the padding
        self.added_embedding = nn.Parameter(_first_row(words, own_row))  # (1, D)
        self.added_output = None
        if self.output is not None:
            self.added_output = nn.Parameter(_first_row(self.output.weight, own_row))
        self.transformer: PreTrainedModel = model.model
        self.transformer.set_input_embeddings(nn.Identity())  # the table is kept once, here
        for name, module in list(self.transformer.named_modules()):
            if hasattr(module, "inv_freq"):
                self.transformer.set_submodule(name, ExactRotary(module))
        self._set_trainable(options)
        for table in (self.embed_tokens, self.output):
            if table is not None:
                table.to(torch.float32 if table.weight.requires_grad else dtype)
        self.keep_trained_in_float32()

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

    def keep_trained_in_float32(self) -> None:
        """Give what trains float32 weights, also under an optimizer without masters of its own.

        To be called again after ``requires_grad`` has been changed. The transformer has one number type beside its
        adapters, so one trained matrix makes all of it float32; quantised weights stay.
        """
        base = [parameter for name, parameter in self.transformer.named_parameters() if not _is_adapter(name)]
        adapters = [parameter for name, parameter in self.transformer.named_parameters() if _is_adapter(name)]
        tables = [table.weight for table in (self.embed_tokens, self.output) if table is not None]
        to_float32 = [parameter for parameter in (*adapters, *tables) if parameter.requires_grad]
        if any(parameter.requires_grad for parameter in base):
            to_float32 += [parameter for parameter in base if parameter.is_floating_point()]
        for parameter in to_float32:
            parameter.data = parameter.data.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as torch does, but keep what ``device_map`` has placed, and rotary frequencies in float32.

        In bfloat16 a rotary angle at position 500 would be off by up to a radian.
        """
        rotary = [module for module in self.transformer.modules() if hasattr(module, "inv_freq")]
        frequencies = [module.inv_freq for module in rotary]
        placed = self.options.device_map is not None
        super()._apply((lambda tensor: _cast_in_place(fn, tensor)) if placed else fn, recurse)
        for module, exact in zip(rotary, frequencies, strict=True):
            if module.inv_freq.dtype != exact.dtype:
                module.inv_freq = exact.to(module.inv_freq.device)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the transformer, and nothing of what surrounds it; the arguments are those of ``torch.compile``."""
        for module in self.transformer.modules():
            if isinstance(module, ExactRotary):  # a compiled graph would lose the switch of TF32
                module.__dict__["without_tf32"] = torch.compiler.disable(module.without_tf32)
        self.transformer.compile(*args, **kwargs)

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the pretrained input embeddings: the scale visual tokens should have."""
        if self.options.embedding_std is not None:
            return self.options.embedding_std
        if self.embed_tokens.weight.is_meta:  # built without weights: what they start from
            return float(self.config.initializer_range)
        return float(self.embed_tokens.weight.detach()[: self.seg_id].float().std())

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number type of the states between the transformer's layers: that of its weights that are not quantised."""
        return next(
            parameter.dtype
            for name, parameter in self.transformer.named_parameters()
            if parameter.is_floating_point() and not _is_adapter(name)
        )

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """Number type of the products of attention on a device: autocast's, or without it ``compute_dtype``."""
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.compute_dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids (any shape) -> (..., D) in the table's number type; negative ids are read as 0."""
        here = ids.to(self.embed_tokens.weight.device)
        base = self.embed_tokens(here.clamp(0, self.embed_tokens.num_embeddings - 1))
        added = self.added_embedding[0].to(base.dtype)
        return torch.where((here == self.seg_id)[..., None], added, base).to(ids.device)

    def read(self, batch: SplicedBatch, visual: Tensor, cache: object = None) -> Tensor:
        """Read sequences in which visual tokens stand among words.

        Args:
            batch: R sequences of L positions, see :func:`~lavis_svp.language.splice.splice`.
            visual: (B, T, D) visual tokens.
            cache: an empty transformers ``Cache`` to fill, or None.

        Returns:
            (R, L, D) states of the last layer after the final norm.
        """
        embeddings = batch.embeddings(self.embed(batch.ids).to(self.compute_dtype), visual)  # (R, L, D)
        mask = batch.attention_mask(self.product_dtype(embeddings.device))
        return self(embeddings, mask, batch.positions, cache)

    def forward(self, embeddings: Tensor, attention_mask: Tensor, positions: Tensor, cache: object = None) -> Tensor:
        """Run the transformer on embeddings.

        Args:
            embeddings: (R, L, D), of any number type.
            attention_mask: (R, 1, L, L_total) additive.
            positions: (R, L).
            cache: a transformers ``Cache`` to read and extend, or None.

        Returns:
            (R, L, D) states of the last layer after the final norm, in ``compute_dtype``.

        Raises:
            ValueError: training with a ``device_map``.
        """
        if self.options.device_map is not None and self.training and torch.is_grad_enabled():
            raise ValueError("model.language.device_map spreads the model for inference only; set it to null to train.")
        states = self.transformer(
            inputs_embeds=embeddings.to(self.compute_dtype),
            attention_mask=attention_mask.to(self.product_dtype(embeddings.device)),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return states.to(embeddings.device, self.compute_dtype)

    def logits(self, states: Tensor) -> Tensor:
        """(P, D) states -> (P, V) float32 scores of the next token, V = ``vocabulary``; ``[SEG]`` is at its id."""
        table = self.embed_tokens.weight if self.output is None else self.output.weight
        row = self.added_embedding if self.added_output is None else self.added_output
        here = states.to(table.device, table.dtype)  # (P, D)
        scores = [F.linear(here, table[: self.seg_id]), F.linear(here.to(row.dtype), row)]  # (P, seg_id), (P, 1)
        if self.vocabulary > self.seg_id + 1:  # a tokenizer that had [SEG] may have tokens after it
            scores.append(F.linear(here, table[self.seg_id + 1 : self.vocabulary]))
        return torch.cat(scores, dim=-1).to(states.device, torch.float32)  # (P, V)

    def loss(self, states: Tensor, batch: SplicedBatch) -> Tensor:
        """Cross-entropy of next-token prediction, computed at supervised positions only, in float32.

        Args:
            states: (R, L, D).
            batch: says which tokens to learn, and where the states that predict them are.

        Returns:
            scalar mean over supervised tokens.
        """
        learned = batch.supervised
        return F.cross_entropy(self.logits(states[learned.rows, learned.columns]), learned.targets)


def _loading_settings(
    options: LanguageOptions, dtype: torch.dtype, device: torch.device | str | None
) -> dict[str, Any]:
    """Arguments of ``from_pretrained``; a ModuleNotFoundError before anything is read if bitsandbytes is missing."""
    settings: dict[str, Any] = {"dtype": torch.float32 if options.tuning == "full" else dtype}
    if options.attn_implementation != "auto":
        settings["attn_implementation"] = options.attn_implementation
    if options.device_map is not None:
        settings["device_map"] = options.device_map
    if options.quantization != "none":
        if find_spec("bitsandbytes") is None:
            raise ModuleNotFoundError(
                f"model.language.quantization is {options.quantization}, which needs bitsandbytes: "
                "pip install bitsandbytes, or set it to none."
            )
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.quantization == "8bit",
            load_in_4bit=options.quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float16 if dtype is torch.float16 else torch.bfloat16,
        )
        if device is not None:
            settings.setdefault("device_map", {"": torch.device(device)})
    return settings


def _check_tables_are_here(embeddings: nn.Embedding, output: nn.Linear | None) -> None:
    """Raise a ValueError if accelerate has offloaded a table: ``[SEG]``'s row is made of it, and it is read whole."""
    tables = {"embed_tokens": embeddings, "lm_head": output}
    offloaded = [name for name, table in tables.items() if table is not None and table.weight.is_meta]
    if offloaded:
        raise ValueError(
            f"model.language.device_map offloads {' and '.join(offloaded)}, which must lie on a device: give a mapping "
            "that names one for them."
        )


def _first_row(table: Tensor, own_row: int | None) -> Tensor:
    """(1, D) float32 that ``[SEG]`` starts from: its own row of a table, or without one the mean of all rows."""
    if own_row is None:
        return table.detach().mean(0, keepdim=True, dtype=torch.float32)
    return table.detach()[own_row : own_row + 1].to(torch.float32, copy=True)


def _is_adapter(name: str) -> bool:
    return "lora_" in name


def _cast_in_place(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` makes of a tensor, on the tensor's own device; offloaded (meta) tensors are left to accelerate."""
    return tensor if tensor.is_meta else fn(tensor).to(tensor.device)


def _cut_layers(model: PreTrainedModel, count: int) -> None:
    layers = model.model.layers
    if not 1 <= count <= len(layers):
        raise ValueError(f"model.language.num_layers is {count}; the model has {len(layers)} layers.")
    model.model.layers = layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):  # Qwen's say which layers see a window only
        model.config.layer_types = model.config.layer_types[:count]
