"""The model of a YAML in shape alone: its parameters by part, and the operations of each part counted on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lavis_svp.models.beside import EXTRA_CHANNELS, append_channels
from lavis_svp.models.parameters import part_of
from lavis_svp.models.svp_ris import OUTLINE_SIZE, SvpRis
from lavis_svp.plan.flops import Flops, count
from lavis_svp.projectors.structures import PatchFeatures, Superpixels, VisualTokens
from lavis_svp.superpixels.sam.generator import LOW_RES_STRIDE, SamSuperpixels
from lavis_svp.superpixels.sam.prompts import first_pass

SECOND_PASS_SHARE = 0.3
"""Of the grid points left after the first pass, the share that is prompted. With MobileSAM on seven photos two passes
take .47 of the time of the whole grid (docs/results/superpixels.json), .35 to .76: about 480 of 1,024 prompts."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a part.

    Args:
        total: all.
        trained: those that train.
    """

    total: int
    trained: int


@dataclass(frozen=True)
class PartFlops:
    """Operations of one forward pass of each part but the language model.

    Args:
        sam_encoder: SAM's image encoder, an image.
        superpixels: SAM's decoder on the point prompts, an image; 0 without SAM superpixels.
        vision_encoder: an image.
        projector: an image.
        readout: from a state to SAM's prompt, an expression.
        mask_decoder: an expression.
    """

    sam_encoder: Flops
    superpixels: Flops
    vision_encoder: Flops
    projector: Flops
    readout: Flops
    mask_decoder: Flops


def parameters_by_part(model: SvpRis) -> dict[str, Parameters]:
    """Parameters of every part, the frozen half told apart; the last entry is the whole model.

    The generator of the superpixels uses the frozen decoder, of which ``mask_decoder`` is a copy.
    """
    frozen = model.frozen
    modules: dict[str, nn.Module] = {
        "vision_encoder": frozen.vision_encoder,
        "sam_encoder": frozen.sam_encoder,
        "sam_prompt_encoder": frozen.sam_prompt_encoder,
        "superpixel_decoder": frozen.sam_mask_decoder,
    }
    found = {name: _parameters(dict(module.named_parameters())) for name, module in modules.items()}
    trained_half: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if part_of(name) != "frozen":
            trained_half.setdefault(part_of(name), {})[name] = parameter
    found |= {part: _parameters(members) for part, members in trained_half.items()}
    found["whole model"] = _parameters(dict(model.named_parameters()))
    return found


def _parameters(members: Mapping[str, Tensor]) -> Parameters:
    counts = [(p.numel(), p.requires_grad) for p in members.values()]
    return Parameters(sum(n for n, _ in counts), sum(n for n, trains in counts if trains))


def visual_tokens(model: SvpRis, superpixels: int) -> int:
    """Visual tokens of an image.

    Args:
        model: the model.
        superpixels: how many an image has; taken, too, where only the features tell the number of tokens.
    """
    fixed = model.projector.image_tokens(model.frozen.vision_encoder.grid, superpixels)
    return superpixels if fixed is None else fixed


def point_prompts(model: SvpRis) -> int:
    """Estimated prompts of SAM's decoder for the superpixels of an image; 0 if they are not SAM's."""
    generator = model.frozen.generator
    if not isinstance(generator, SamSuperpixels):
        return 0
    side = generator.options.points_per_side
    first = len(first_pass(side, generator.options.first_stride))
    return first + round(SECOND_PASS_SHARE * (side * side - first))


def part_flops(model: SvpRis, superpixels: int, prompts: int) -> PartFlops:
    """Count every part but the language model on the meta device.

    Args:
        model: a skeleton.
        superpixels: of an image.
        prompts: point prompts of an image.
    """
    frozen, side = model.frozen, model.options.sam.side
    sam, embedding = count(lambda: frozen.sam_encoder(torch.empty(1, 3, side, side), torch.empty(1, 1, side, side)))
    vision, features = count(lambda: frozen.vision_encoder(torch.empty(1, 3, side, side)))
    projector, visual = count(lambda: project(model, features, superpixels))
    readout, sparse = count(lambda: read_out(model, visual))
    mask, _ = count(lambda: decode_mask(model, embedding, sparse))
    return PartFlops(sam, superpixel_flops(model, embedding, prompts), vision, projector, readout, mask)


def superpixel_flops(model: SvpRis, embedding: Tensor, prompts: int) -> Flops:
    """SAM's decoder on the point prompts of one image whose embedding is (1, 256, h, w)."""
    generator = model.frozen.generator
    if not isinstance(generator, SamSuperpixels):
        return Flops()
    decoder = generator.point_decoder()
    side = embedding.shape[-1] * LOW_RES_STRIDE
    once, image = count(lambda: decoder.image(embedding[0]))
    one, _ = count(lambda: decoder.decode(image, torch.empty(1, 2, embedding.shape[1]), (side, side)))
    return once + one * prompts


def project(model: SvpRis, features: PatchFeatures, superpixels: int) -> VisualTokens:
    """Run the projector on one image's features, with the inputs it asks for."""
    projector, frozen, side = model.projector, model.frozen, model.options.sam.side
    frame = torch.empty(1, EXTRA_CHANNELS["sam"], 1, 1), torch.empty(1, EXTRA_CHANNELS["colour"], side, side)
    features = append_channels(features, frozen.recipe.encoder.beside, *frame, [(1.0, 1.0)])
    patches = features.patches
    size = projector.mask_size
    given = Superpixels(
        torch.empty(1, superpixels, patches.shape[1]),
        None if size is None else torch.empty(1, superpixels, *size),
        torch.ones(1, superpixels, dtype=torch.bool),
    )
    return projector(features, given if "superpixels" in projector.requires else None)


def read_out(model: SvpRis, visual: VisualTokens) -> Tensor:
    """Run the read-out on one state: the prompt (1, 1, 256)."""
    options = model.options.readout
    tokens, image = visual.tokens, torch.zeros(1, dtype=torch.long)
    given: dict[str, Any] = {}
    if options.pointer_position:
        given["positions"] = torch.empty(*tokens.shape[:2], model.mask_head.point_token.shape[0])
        given["point_token"] = model.mask_head.point_token
    if options.pointer_mask:
        given["areas"] = torch.empty(*tokens.shape[:2], *OUTLINE_SIZE)
    readout = model.readout.eval()
    return readout(torch.empty(1, model.language.dim), image, tokens, visual.valid, **given).sparse


def decode_mask(model: SvpRis, embedding: Tensor, sparse: Tensor) -> Tensor:
    """Run the trained mask decoder on one prompt: logits (1, 4h, 4w).

    The decoder itself, not ``SegMaskDecoder.forward``, which looks at the values of an index.
    """
    head = model.mask_head
    size = embedding.shape[-2:]
    dense = head.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *size)  # (1, 256, h, w)
    if model.options.readout.pointer_mask:
        dense = head.prompt_encoder.mask_downscaling(torch.empty(1, 1, 4 * size[0], 4 * size[1]))
    masks, _ = head.mask_decoder.predict_masks(
        image_embeddings=embedding,
        image_pe=head.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    return masks[:, 0]
