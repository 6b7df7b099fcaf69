"""Patch features from the vision tower of a Qwen2.5-VL or Qwen2-VL, before its merger, in row-major order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from lavis_svp.common.transfer import to_device
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.projectors import PatchFeatures
from lavis_svp.vision.backbone import BlockAttention
from lavis_svp.vision.types import Grid


def image_grids(image_grid_thw: Tensor) -> list[Grid]:
    """Read the (h, w) patch grid of each image from the processor's (P, 3) ``image_grid_thw``.

    Raises:
        ValueError: an entry has more than one step in time, so it is a video.
    """
    sizes = image_grid_thw.tolist()
    for number, (time, _, _) in enumerate(sizes):
        if time != 1:
            raise ValueError(f"Image {number} has {time} steps in time: a swapped projector works on images only.")
    return [(height, width) for _, height, width in sizes]


def windowed_blocks(tower: PreTrainedModel) -> frozenset[int]:
    """List the blocks that attend within windows only; Qwen2-VL has none."""
    blocks = range(len(tower.blocks))
    return frozenset(blocks) - frozenset(getattr(tower, "fullatt_block_indexes", blocks))


@dataclass(frozen=True)
class PatchOrder:
    """The tower's order of the M patches of all images: cells of r x r patches together, cells by windows.

    Args:
        grouped: (M,) int64; patch m in the tower's order is patch ``grouped[m]`` of the pixels' order.
        raster: (M,) int64; patch n of the row-major order, image after image, is patch ``raster[n]`` of the tower's
            order.
        windows: int32, ends of the attention windows, beginning with 0. Only flash attention needs them on the device;
            for the others they stay on the CPU, where each block reads them three times.
        images: int32, ends of the images, beginning with 0; likewise.
    """

    grouped: Tensor
    raster: Tensor
    windows: Tensor
    images: Tensor

    @classmethod
    def of(cls, tower: PreTrainedModel, image_grid_thw: Tensor, device: torch.device) -> PatchOrder:
        """Compute the order for images of these (P, 3) grids, on the CPU, with the windows of a vision tower."""
        merge, unit = tower.spatial_merge_size, tower.spatial_merge_size**2
        cells, window_ends = torch.arange(int(image_grid_thw.prod(dim=1).sum()) // unit), [0]
        if windowed_blocks(tower):
            cells, window_ends = tower.get_window_index(image_grid_thw)
        grouped = (cells[:, None] * unit + torch.arange(unit)).flatten()  # (M,)
        places, start = [], 0
        for height, width in image_grids(image_grid_thw):
            place = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
            places.append(start + place.transpose(1, 2).flatten())  # of each patch in the pixels' order
            start += height * width
        raster = torch.cat(places)[grouped].argsort()  # (M,)
        windows = torch.tensor(window_ends, dtype=torch.int32).unique_consecutive()  # without empty windows
        images = F.pad(image_grid_thw.prod(dim=1).cumsum(0), (1, 0)).to(torch.int32)
        if tower.config._attn_implementation == "flash_attention_2":
            windows, images = to_device(windows, device), to_device(images, device)
        return cls(to_device(grouped, device), to_device(raster, device), windows, images)


def qwen_features(
    tower: PreTrainedModel, pixel_values: Tensor, image_grid_thw: Tensor, swap: SwapConfig
) -> PatchFeatures:
    """Run the tower up to its merger.

    The tower has no CLS token. ``cls_attention`` is the attention that a patch receives from all of its image in the
    last block that attends to whole images; ``keys`` are the keys of that block before their rotation.

    Args:
        tower: the vision tower; its merger does not run.
        pixel_values: (M, K) flattened patches of all images from the image processor.
        image_grid_thw: (P, 3) grid of each image, in patches.
        swap: the encoder outputs that the projector needs, and its levels: hidden states, 0 is the embedding, negative
            ones count from the end.

    Returns:
        (P, N, C) patches, row-major; images with fewer than N are padded at the right.

    Raises:
        ValueError: a video; levels that the tower does not have; the projector needs attention, but the tower attends
            within windows only.
    """
    image_grid_thw = image_grid_thw.cpu()  # read number by number below
    grids, needed = image_grids(image_grid_thw), swap.encoder_outputs
    order = PatchOrder.of(tower, image_grid_thw, pixel_values.device)
    angles = tower.rot_pos_emb(image_grid_thw).to(pixel_values.device)[order.grouped]  # (M, d / 2)
    angles = torch.cat([angles, angles], dim=-1)
    rotation = (angles.cos(), angles.sin())
    states = tower.patch_embed(pixel_values.to(tower.dtype))[order.grouped]  # (M, C)
    count = len(tower.blocks) + 1
    full_block = _last_full_block(tower) if needed & {"cls_attention", "keys"} else 0
    wrong = [level for level in swap.levels if not -count <= level < count]
    if wrong:
        raise ValueError(f"levels {wrong} do not exist: the tower has hidden states 0 (embedding) to {count - 1}.")
    levels = [level % count for level in swap.levels]
    hidden = {0: states}  # only the hidden states that are needed: all of them would fill the memory
    for number, block in enumerate(tower.blocks):
        ends = order.windows if number in windowed_blocks(tower) else order.images
        states = block(states, cu_seqlens=ends, position_embeddings=rotation)
        if number + 1 in (full_block, *levels):
            hidden[number + 1] = states

    def unpack(values: Tensor) -> Tensor:
        """Bring (M, ...) from the tower's order to (P, N, ...), right-padded."""
        parts = values[order.raster].split([height * width for height, width in grids])
        return pad_sequence(list(parts), batch_first=True)  # (P, N, ...)

    patches = unpack(states)
    valid = unpack(states.new_ones(len(states), dtype=torch.bool))
    extras: dict[str, Any] = {}
    if levels:
        extras["levels"] = torch.stack([unpack(hidden[level]) for level in levels], dim=1)  # (P, L, N, C)
    if needed & {"cls_attention", "keys"}:
        attention = _block_attention(tower, hidden[full_block], full_block, rotation, unpack)
        extras["keys"] = attention.patch_keys() if "keys" in needed else None  # (P, N, d)
        if "cls_attention" in needed:
            received = attention.to_patches(valid, valid).masked_fill(~valid, 0.0)
            extras["cls_attention"] = received.to(patches.dtype)  # (P, N)
    return PatchFeatures(patches, grids, valid, **extras)


def _last_full_block(tower: PreTrainedModel) -> int:
    full = sorted(set(range(len(tower.blocks))) - windowed_blocks(tower))
    if not full:
        raise ValueError(
            "The projector ranks patches by attention over the whole image, but every block of this vision tower "
            "attends within windows only (fullatt_block_indexes is empty)."
        )
    return full[-1]


def _block_attention(
    tower: PreTrainedModel,
    states: Tensor,
    number: int,
    rotation: tuple[Tensor, Tensor],
    unpack: Callable[[Tensor], Tensor],
) -> BlockAttention:
    """Compute queries and keys of a block; ``states`` (M, C) enter it, ``unpack`` restores the images' order."""
    block = tower.blocks[number]
    heads = block.attn.num_heads
    joined = block.attn.qkv(block.norm1(states)).view(len(states), 3, heads, -1)  # (M, 3, H, d)
    queries, plain, _ = joined.unbind(1)  # (M, H, d)
    turned = apply_rotary_pos_emb_vision(queries, plain, *rotation)
    rotated, keys, plain_keys = (unpack(part).transpose(1, 2) for part in (*turned, plain))  # (P, H, N, d)
    return BlockAttention(rotated, keys, plain_keys, prefix=0)
