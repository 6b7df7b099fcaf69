"""What a vision transformer makes of images: patches, and whatever else a projector asks for.

Also for the vision tower of a host: nothing is frozen here, and gradients flow.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lavis_svp.common.options import check_keys
from lavis_svp.encoders.attention import block_attention
from lavis_svp.encoders.families import VisionFamily
from lavis_svp.projectors.base import ENCODER_OUTPUTS
from lavis_svp.projectors.structures import Grid, PatchFeatures


def check_outputs(layers: int, layer: int, levels: Sequence[int], wants: Collection[str]) -> None:
    """Check that an encoder can give what is asked of it.

    Args:
        layers: number of its blocks.
        layer: the layer whose patches are returned.
        levels: the layers that are returned besides.
        wants: names of optional outputs.

    Raises:
        ValueError: a layer that does not exist, no levels where they are wanted, attention of the embedding, or an
            unknown output.
    """
    check_keys(wants, sorted(ENCODER_OUTPUTS), "what a vision encoder is asked for")
    for index in (layer, *levels):
        if not -layers - 1 <= index <= layers:
            raise ValueError(f"Layer {index} does not exist: the encoder has {layers} layers.")
    if "levels" in wants and not levels:
        raise ValueError(
            "The projector needs levels, several layers of the vision encoder, but none are named: set "
            f"model.vision_encoder.levels, for example [{', '.join(str(layers * part // 4) for part in (1, 2, 3, 4))}]."
        )
    attention = sorted({"cls_attention", "keys"} & set(wants))
    if attention and layer % (layers + 1) == 0:
        raise ValueError(
            f"Layer {layer} is the embedding, which has no attention, but {' and '.join(attention)} are wanted: set "
            "model.vision_encoder.layer to another one."
        )


def encode_patches(
    network: PreTrainedModel,
    family: VisionFamily,
    pixel_values: Tensor,
    valid: Tensor,
    layer: int = -1,
    levels: Sequence[int] = (),
    wants: Collection[str] = (),
) -> PatchFeatures:
    """Run a vision transformer on images of one size.

    ``cls_attention`` and ``keys`` are those of the block that puts out the hidden state ``layer`` (-1: the last
    block), as VisionZip takes them (arXiv 2412.04467, section 3.2). ``summary`` is of the last layer, with its norm.

    Args:
        network: a model of the family, for example the vision tower of a host.
        family: see :func:`lavis_svp.encoders.families.family_of`.
        pixel_values: (B, 3, H, W) normalised images. What does not fill a patch at the right and lower edge is not
            seen, as with SigLIP's patches of 14 at its published side 384.
        valid: (B, N) bool, patches that show the image; N = floor(H / patch) floor(W / patch).
        layer: which layer's patches: -1 what the model calls its last hidden state, with the final norm where the
            family has one for patches (CLIP has none); else the index of a hidden state, 0 the embedding, negative
            from the end, without the norm. The last block's output without the norm is ``num_hidden_layers``.
        levels: indices, as for ``layer``, of layers returned besides.
        wants: further outputs, of ``ENCODER_OUTPUTS``.

    Returns:
        The patches and ``wants``; levels are returned if there are any. Attention of invalid patches is 0.

    Raises:
        ValueError: what :func:`check_outputs` refuses, or ``valid`` of another size.
    """
    layers: int = network.config.num_hidden_layers
    check_outputs(layers, layer, levels, wants)
    grid = _grid(pixel_values, network.config.patch_size)
    if tuple(valid.shape) != (len(pixel_values), grid[0] * grid[1]):
        raise ValueError(
            f"Images {tuple(pixel_values.shape)} have {grid[0]}x{grid[1]} patches, valid is {tuple(valid.shape)}."
        )
    if pixel_values.is_meta and family.names.rotary is not None:
        raise NotImplementedError(
            f"transformers runs {type(network).__name__} on no meta device (its rotation asks for autocast there), so "
            "its operations cannot be counted without weights. Training and prediction work."
        )
    attention = {"cls_attention", "keys"} & set(wants)
    outputs = network(
        **family.inputs(pixel_values, valid, network.config.patch_size),
        output_hidden_states=bool(attention) or any(index != -1 for index in (layer, *levels)),
    )
    prefix = family.prefix_tokens(network.config)
    stacked = [_states(outputs, index)[:, prefix:] for index in levels]
    features = PatchFeatures(
        patches=_states(outputs, layer)[:, prefix:],  # (B, N, C)
        grids=[grid] * len(pixel_values),
        valid=valid,
        levels=torch.stack(stacked, dim=1) if stacked else None,  # (B, L, N, C)
    )
    found: dict[str, Any] = {}
    if attention:
        block = layer % (layers + 1) - 1
        heads = block_attention(network, family, outputs.hidden_states[block], block, pixel_values)
        if "cls_attention" in attention:
            seen = valid if family.masked else torch.ones_like(valid)
            seen = torch.cat([seen.new_ones(len(seen), prefix), seen], dim=1)  # (B, T)
            weights = heads.to_patches(seen, valid).masked_fill(~valid, 0.0)
            found["cls_attention"] = weights.to(features.patches.dtype)  # (B, N)
        if "keys" in attention:
            found["keys"] = heads.patch_keys()  # (B, N, K)
    if "summary" in wants:
        found["summary"] = outputs.pooler_output if prefix else _mean(outputs.last_hidden_state, valid)  # (B, C)
    return replace(features, **found)


def _grid(pixels: Tensor, patch: int) -> Grid:
    height, width = pixels.shape[-2:]
    return height // patch, width // patch


def _states(outputs: BaseModelOutputWithPooling, index: int) -> Tensor:
    """All tokens (B, T, C) of layer ``index``."""
    return outputs.last_hidden_state if index == -1 else outputs.hidden_states[index]


def _mean(patches: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid patches: (B, N, C) -> (B, C)."""
    share = valid.to(patches.dtype)
    return torch.einsum("bn,bnc->bc", share, patches) / share.sum(1, keepdim=True).clamp_min(1)  # (B, C)
