"""SAM's plain ViT image encoder (vit_b, vit_l, vit_h), built from a checkpoint's shapes for any side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn import functional

PATCH = 16
WINDOW = 14  # side of the local attention windows, in patches
OUT_CHANNELS = 256


@dataclass(frozen=True)
class SamVitShape:
    """What tells one SAM ViT from another.

    Args:
        width: embedding width.
        depth: number of blocks.
        heads: attention heads.
        global_blocks: indices of the blocks that attend globally, not in windows.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


PUBLISHED = {
    "vit_b": SamVitShape(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": SamVitShape(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamVitShape(1280, 32, 16, (7, 15, 23, 31)),
}


def shape_of(state: Mapping[str, Tensor]) -> SamVitShape:
    """Read a SAM ViT's shape off its tensors.

    Args:
        state: the image encoder's tensors, named without ``image_encoder.``.

    Raises:
        ValueError: they are not a SAM ViT's.
    """
    tables = {
        int(match[1]): value.shape
        for name, value in state.items()
        if (match := re.fullmatch(r"blocks\.(\d+)\.attn\.rel_pos_h", name))
    }
    if "pos_embed" not in state or not tables:
        raise ValueError("its image encoder has no pos_embed and rel_pos_h tensors, so it is not a SAM ViT")
    width = state["pos_embed"].shape[-1]
    head_width = tables[0][1]
    global_blocks = tuple(sorted(index for index, (length, _) in tables.items() if length != 2 * WINDOW - 1))
    return SamVitShape(width, len(tables), width // head_width, global_blocks)


def build_sam_vit(shape: SamVitShape, side: int) -> nn.Module:
    """Build the encoder for images of ``side`` pixels, with fresh weights.

    Args:
        shape: which ViT.
        side: input side, divisible by 16.
    """
    return ImageEncoderViT(
        img_size=side,
        patch_size=PATCH,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=4,
        out_chans=OUT_CHANNELS,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=WINDOW,
        global_attn_indexes=shape.global_blocks,
    )


def resized_positions(state: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """Interpolate the position tables of a SAM ViT for another side.

    Absolute positions bicubically, the global blocks' relative positions linearly, as SAM itself does with relative
    tables of another length. Windowed blocks need nothing. At the side of the checkpoint nothing changes.

    Args:
        state: the image encoder's tensors, named without ``image_encoder.``.
        side: the input side wanted.
    """
    grid = side // PATCH
    resized = dict(state)
    positions = state["pos_embed"]  # (1, h, w, C)
    if positions.shape[1] == grid:
        return resized
    channels_first = positions.permute(0, 3, 1, 2).float()  # (1, C, h, w)
    grown = functional.interpolate(channels_first, (grid, grid), mode="bicubic", align_corners=False)
    resized["pos_embed"] = grown.permute(0, 2, 3, 1).to(positions.dtype)  # (1, grid, grid, C)
    for index in shape_of(state).global_blocks:
        for axis in "hw":
            name = f"blocks.{index}.attn.rel_pos_{axis}"
            table = state[name].float().T[None]  # (1, d, 2 h - 1)
            longer = functional.interpolate(table, 2 * grid - 1, mode="linear", align_corners=False)
            resized[name] = longer[0].T.to(torch.float32).contiguous()  # (2 grid - 1, d)
    return resized
