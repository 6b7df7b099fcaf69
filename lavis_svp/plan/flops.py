"""Parameters and floating-point operations of a model without weights, counted on its modules on the meta device.

One multiplication and one addition are two operations. Only products count (matrix products, convolutions, attention);
norms, activations and resizing are left out, as ``FlopCounterMode`` does. The language model's cost is a formula of its
shape, because it is needed for many lengths; a test compares it with counted operations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.splice import NounStates
from lavis_svp.models.param_groups import part_of
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.superpixels.one_pass.generator import OnePassSuperpixels
from lavis_svp.superpixels.sam.generator import LOW_RES_STRIDE, SamSuperpixels
from lavis_svp.superpixels.sam.prompts import first_pass
from lavis_svp.vision.classifier import CLASSES, WIDTH
from lavis_svp.vision.extra_channels import EXTRA_CHANNELS, ClassMaps, append_channels
from lavis_svp.vision.types import PatchFeatures

T = TypeVar("T")
ACTIVATION_PRODUCTS = ("bmm", "baddbmm", "attention")  # of activations; other products have a parameter


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass, by their cost in training."""

    weights: float = 0.0  # products of activations with parameters
    mixing: float = 0.0  # products of activations with each other: attention, pooling

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.mixing

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.weights + other.weights, self.mixing + other.mixing)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.weights * factor, self.mixing * factor)


def count(run: Callable[[], T]) -> tuple[Flops, T]:
    """Count the operations of ``run`` on the meta device; tensors that it creates are put there, too.

    It must not run under ``no_grad``: the counter hooks into every module, and fails if trained parameters have no
    gradient function.

    Returns:
        the operations, and the result of ``run``.
    """
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        result = run()
    return counted(counter), result


def counted(counter: FlopCounterMode) -> Flops:
    """Read the operations off a counter."""
    by_operator: dict[Any, int] = counter.get_flop_counts().get("Global", {})
    mixing = sum(
        number
        for operator, number in by_operator.items()
        if any(product in str(operator) for product in ACTIVATION_PRODUCTS)
    )
    return Flops(float(sum(by_operator.values()) - mixing), float(mixing))


def training_flops(forward: Flops, trained: float, gradient_flows: bool, recompute: bool = False) -> Flops:
    """Operations of a training step, from those of its forward pass.

    A product with a parameter costs the same again for the gradient of its input, and once more for the gradient of
    the parameter if that is trained. A product of two activations costs twice as much again. A part without gradients
    costs its forward pass alone; a frozen part between trained ones still passes gradients of activations. Gradient
    checkpointing runs the forward pass twice.

    Args:
        forward: of the forward pass.
        trained: share of ``forward.weights`` whose parameters are trained, 0 to 1.
        gradient_flows: whether gradients pass through the part at all.
        recompute: gradient checkpointing.
    """
    if not gradient_flows:
        return forward
    return Flops(forward.weights * (2 + trained + recompute), forward.mixing * (3 + recompute))


@dataclass(frozen=True)
class LanguageShape:
    """The sizes that the cost of a decoder-only language model depends on."""

    linear: int  # weights of all linear layers of the transformer, adapters included
    trained_linear: int  # those of them that are trained
    layers: int  # number of decoder layers
    width: int  # D
    attention_width: int  # query heads times head width
    vocabulary: int  # rows of the output layer, ``[SEG]`` included
    output_trains: bool  # whether the output layer is trained
    checkpointing: bool  # gradient checkpointing

    def forward(self, tokens: float, context: float) -> Flops:
        """Operations of the transformer's forward pass, without the output layer.

        Args:
            tokens: positions that run.
            context: positions that each of them attends to. Masked ones count: the kernels for an additive mask
                compute them.
        """
        return Flops(2.0 * self.linear * tokens, 4.0 * self.attention_width * self.layers * tokens * context)

    def logits(self, tokens: float) -> Flops:
        """Operations of the output layer for a number of positions."""
        return Flops(2.0 * self.width * self.vocabulary * tokens)

    @property
    def trained_share(self) -> float:
        """Share of the linear weights that are trained."""
        return self.trained_linear / self.linear


def language_shape(language: LanguageModel) -> LanguageShape:
    """Read the sizes off the real module."""
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


SECOND_PASS_SHARE = 0.3
"""Share of the grid points left after the first pass that is prompted. With MobileSAM on seven photos two passes take
.47 of the time of the whole grid (benchmarks/results/superpixels.json), .35 to .76: about 480 of 1,024 prompts."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a part: all, and the trained ones."""

    total: int
    trained: int


@dataclass(frozen=True)
class PartFlops:
    """Operations of one forward pass of each part but the language model."""

    sam_encoder: Flops  # SAM's image encoder, per image
    superpixels: Flops  # the boundary head, or SAM's decoder on the point prompts, per image; 0 with other superpixels
    vision_encoder: Flops  # per image
    projector: Flops  # per image
    seg_prompt: Flops  # from a state to SAM's prompt, per expression
    mask_decoder: Flops  # per expression
    classifier: Flops = Flops()  # the image classifier, per image; 0 where nothing reads it


def parameters_by_part(model: SvpRis) -> dict[str, Parameters]:
    """Count the parameters of every part, and of the whole model in the last entry.

    The superpixel generator uses the frozen decoder ("superpixel_decoder"), of which ``mask_decoder`` is a copy, or a
    "boundary_head", which is no part of the model and does not count among all.
    """
    frozen = model.extractor
    members = {
        "vision_encoder": list(frozen.vision_encoder.parameters()),
        "sam_encoder": list(frozen.sam_encoder.parameters()),
        "sam_prompt_encoder": list(frozen.sam_prompt_encoder.parameters()),
        "superpixel_decoder": list(frozen.sam_mask_decoder.parameters()),
    }
    if frozen.classifier is not None:
        members["classifier"] = list(frozen.classifier.parameters())
    for name, parameter in model.named_parameters():
        if part_of(name) != "frozen":
            members.setdefault(part_of(name), []).append(parameter)
    if isinstance(frozen.generator, OnePassSuperpixels):
        members["boundary_head"] = list(frozen.generator.loaded.head.parameters())
    members["whole model"] = list(model.parameters())
    return {
        name: Parameters(sum(p.numel() for p in each), sum(p.numel() for p in each if p.requires_grad))
        for name, each in members.items()
    }


def visual_tokens(model: SvpRis, superpixels: int) -> int:
    """Number of visual tokens of an image; that of its superpixels if the number of tokens depends on the features."""
    fixed = model.projector.image_tokens(model.extractor.vision_encoder.grid, superpixels)
    return superpixels if fixed is None else fixed


def point_prompts(model: SvpRis) -> int:
    """Estimated number of point prompts for the superpixels of an image; 0 if SAM does not make them."""
    generator = model.extractor.generator
    if not isinstance(generator, SamSuperpixels):
        return 0
    side = generator.options.points_per_side
    first = len(first_pass(side, generator.options.first_stride))
    return first + round(SECOND_PASS_SHARE * (side * side - first))


def part_flops(model: SvpRis, superpixels: int, prompts: int) -> PartFlops:
    """Count every part of a skeleton but the language model, given superpixels and point prompts per image."""
    frozen, side = model.extractor, model.options.sam.side
    sam, embedding = count(lambda: frozen.sam_encoder(torch.empty(1, 3, side, side), torch.empty(1, 1, side, side)))
    vision, features = count(lambda: frozen.vision_encoder(torch.empty(1, 3, side, side)))
    projector, visual = count(lambda: project(model, features, superpixels))
    seg_prompt, sparse = count(lambda: make_seg_prompts(model, visual))
    mask, _ = count(lambda: decode_mask(model, embedding, sparse))
    classes = Flops()
    if frozen.classifier is not None:
        network = frozen.classifier
        classes, _ = count(lambda: network(torch.empty(1, 3, side, side)))
    return PartFlops(sam, superpixel_flops(model, embedding, prompts), vision, projector, seg_prompt, mask, classes)


def superpixel_flops(model: SvpRis, embedding: Tensor, prompts: int) -> Flops:
    """Count the boundary head, or SAM's decoder on the point prompts, for one image's embedding (1, 256, h, w)."""
    generator = model.extractor.generator
    side = embedding.shape[-1] * LOW_RES_STRIDE
    if isinstance(generator, OnePassSuperpixels):
        head = copy.deepcopy(generator.loaded.head).to("meta")
        return count(lambda: head(embedding, torch.empty(1, 3, side, side)))[0]
    if not isinstance(generator, SamSuperpixels):
        return Flops()
    decoder = generator.point_decoder()
    once, image = count(lambda: decoder.image(embedding[0]))
    one, _ = count(lambda: decoder.decode(image, torch.empty(1, 2, embedding.shape[1]), (side, side)))
    return once + one * prompts


def project(model: SvpRis, features: PatchFeatures, superpixels: int) -> VisualTokens:
    """Run the projector on one image's features, with the inputs that it requires."""
    projector, side = model.projector, model.options.sam.side
    names = model.extractor.config.encoder.extra_channels
    sam, pixels = torch.empty(1, EXTRA_CHANNELS["sam"], 1, 1), torch.empty(1, EXTRA_CHANNELS["colour"], side, side)
    classes = _class_maps(model, features.patches.shape[1])
    features = append_channels(features, names, sam, pixels, [(1.0, 1.0)], classes=classes)
    size = projector.mask_size
    regions = Superpixels(
        torch.empty(1, superpixels, features.patches.shape[1]),
        None if size is None else torch.empty(1, superpixels, *size),
        torch.ones(1, superpixels, dtype=torch.bool),
    )
    return projector(features, regions if "superpixels" in projector.requires else None)


def _class_maps(model: SvpRis, patches: int) -> ClassMaps | None:
    """Empty features of the image classifier on one image's patches; None where nothing reads it."""
    classifier = model.extractor.classifier
    return None if classifier is None else ClassMaps(torch.empty(1, patches, WIDTH), classifier.class_log_probs)


def make_seg_prompts(model: SvpRis, visual: VisualTokens) -> Tensor:
    """Run the prompt head on one state: the prompt (1, 1, 256)."""
    positions = point = None
    if model.options.seg_prompt.pointer_position:
        point = model.mask_decoder.point_token
        positions = torch.empty(*visual.tokens.shape[:2], point.shape[0])
    image_index = torch.zeros(1, dtype=torch.long)
    states, nouns = torch.empty(1, model.language.dim), None
    if model.options.seg_prompt.pointer_nouns:  # one noun
        nouns = NounStates(states[:, None], torch.zeros(1, 1, dtype=torch.long))
        visual.classes = torch.empty(*visual.tokens.shape[:2], CLASSES)
    return model.seg_prompt.eval()(states, image_index, visual, positions, point, nouns).sparse


def decode_mask(model: SvpRis, embedding: Tensor, sparse: Tensor) -> Tensor:
    """Run the trained mask decoder on one prompt: logits (1, 4h, 4w).

    It calls SAM's decoder, because ``SegMaskDecoder.forward`` reads the values of an index.
    """
    head = model.mask_decoder
    size = embedding.shape[-2:]
    dense = head.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *size)  # (1, 256, h, w)
    masks, _ = head.mask_decoder.predict_masks(
        image_embeddings=embedding,
        image_pe=head.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    return masks[:, 0]
