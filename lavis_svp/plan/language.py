"""Operations and memory of the language model as formulas of its shape; a test compares them with counted ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.plan.flops import Flops, counted, counting


@dataclass(frozen=True)
class LanguageShape:
    """What the costs of a decoder-only language model depend on.

    Args:
        linear: weights of all linear layers of the transformer, adapters included.
        trained_linear: those of them that train.
        layers: number of decoder layers.
        width: D.
        attention_width: query heads times head width.
        vocabulary: rows of the output layer, ``[SEG]`` included.
        output_trains: whether the output layer trains.
        checkpointing: gradient checkpointing.
    """

    linear: int
    trained_linear: int
    layers: int
    width: int
    attention_width: int
    vocabulary: int
    output_trains: bool
    checkpointing: bool

    def forward(self, tokens: float, context: float) -> Flops:
        """Operations of the transformer's forward pass, without the output layer.

        Args:
            tokens: positions that run.
            context: positions that each of them attends to. Masked ones count: the kernels for an additive mask
                compute them.
        """
        return Flops(2.0 * self.linear * tokens, 4.0 * self.attention_width * self.layers * tokens * context)

    def logits(self, tokens: float) -> Flops:
        """Operations of the output layer for so many positions."""
        return Flops(2.0 * self.width * self.vocabulary * tokens)

    @property
    def trained_share(self) -> float:
        """Share of the linear weights that train."""
        return self.trained_linear / self.linear


def language_shape(language: LanguageModel) -> LanguageShape:
    """Read the shape off the real module."""
    config = language.config
    linear = [module.weight for module in language.transformer.modules() if isinstance(module, nn.Linear)]
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    output = language.embed_tokens.weight if language.output is None else language.output.weight
    return LanguageShape(
        linear=sum(weight.numel() for weight in linear),
        trained_linear=sum(weight.numel() for weight in linear if weight.requires_grad),
        layers=config.num_hidden_layers,
        width=language.dim,
        attention_width=config.num_attention_heads * head_width,
        vocabulary=language.seg_id + 1,
        output_trains=output.requires_grad,
        checkpointing=language.options.gradient_checkpointing,
    )


def counted_forward(language: LanguageModel, length: int) -> tuple[Flops, torch.Size]:
    """Count the operations of the real transformer over one sequence of ``length``, and tell the states' shape.

    Runs on fake tensors that say they lie on the CPU: the rotary embedding turns autocast off by the name of the
    device, and there is no autocast for "meta". Attention is counted in its plain form.

    Args:
        language: built without weights; its transformer is copied, the original stays as it is.
        length: L.
    """
    import copy

    transformer = copy.deepcopy(language.transformer)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        transformer = transformer.to_empty(device="cpu").eval()
    with fake, sdpa_kernel(SDPBackend.MATH), counting() as counter:
        states = transformer(
            inputs_embeds=torch.zeros(1, length, language.dim),
            attention_mask=torch.zeros(1, 1, length, length),
            position_ids=torch.arange(length)[None],
            use_cache=False,
        ).last_hidden_state
    return counted(counter), states.shape
