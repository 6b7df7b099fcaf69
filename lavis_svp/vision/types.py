"""What a vision encoder makes of a batch of images: patch features on their grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_svp.common.transfer import to_device

Grid = tuple[int, int]
"""Rows and columns of patches, (h, w)."""
ENCODER_OUTPUTS = frozenset({"levels", "cls_attention", "keys"})
"""The optional fields of :class:`PatchFeatures`, made only when a projector requires them."""
CLASSIFIER = "classifier"
"""The further output of a feature extractor: the image classifier's features, made only when something reads them."""


@dataclass
class PatchFeatures:
    """Patch features of a batch of images, as a vision encoder gives them.

    Args:
        patches: (B, N, C), row-major over each image's grid, CLS and register tokens removed, right-padded.
        grids: the (h, w) of each image; h * w <= N. Patch n lies in row n // w, column n % w.
        valid: (B, N) bool, True where a patch shows the image; False in letter-box and batch padding.
        levels: (B, L, N, C) inner layers of the encoder, for projectors that fuse several.
        cls_attention: (B, N) attention of CLS to the patches, for projectors that rank patches; an encoder without
            CLS gives the attention that each patch gets from all.
        keys: (B, N, K) what the patches are compared by, for projectors that merge alike ones: the encoder's
            attention keys, averaged over heads.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    patches: Tensor
    grids: list[Grid]
    valid: Tensor
    levels: Tensor | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None

    def __post_init__(self) -> None:
        if self.patches.ndim != 3:
            raise ValueError(f"patches must be (B, N, C), got shape {tuple(self.patches.shape)}.")
        batch, count, width = self.patches.shape
        if tuple(self.valid.shape) != (batch, count):
            raise ValueError(f"valid must be (B, N) = {(batch, count)}, got shape {tuple(self.valid.shape)}.")
        if len(self.grids) != batch:
            raise ValueError(f"{batch} images need {batch} grids, got {len(self.grids)}.")
        for index, (h, w) in enumerate(self.grids):
            if h < 1 or w < 1 or h * w > count:
                raise ValueError(f"Image {index} has grid {h}x{w} = {h * w} patches, but there are N = {count}.")
        if self.levels is not None and (self.levels.shape[0], *self.levels.shape[2:]) != (batch, count, width):
            raise ValueError(f"levels must be (B, L, N, C) = ({batch}, L, {count}, {width}), got {self.levels.shape}.")
        if self.cls_attention is not None and tuple(self.cls_attention.shape) != (batch, count):
            raise ValueError(f"cls_attention must be (B, N) = {(batch, count)}, got {self.cls_attention.shape}.")
        if self.keys is not None and (self.keys.ndim != 3 or tuple(self.keys.shape[:2]) != (batch, count)):
            raise ValueError(f"keys must be (B, N, K) = ({batch}, {count}, K), got {tuple(self.keys.shape)}.")

    @classmethod
    def whole(cls, patches: Tensor, grid: Grid) -> PatchFeatures:
        """Features (B, h * w, C) of images that all fill the same ``grid``, (h, w), without padding."""
        valid = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        return cls(patches, [grid] * patches.shape[0], valid)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of every patch in its own image's grid: two (B, N) int64."""
        return grid_coordinates(self.grids, self.patches.shape[1], self.patches.device)


def grid_coordinates(grids: Sequence[Grid], patches: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Row and column of each of ``patches`` places in B grids, row-major: two (B, N) int64."""
    index = torch.arange(patches, device=device)[None]  # (1, N)
    widths = {w for _, w in grids}
    if len(widths) == 1:  # a number in Python needs no copy to the device
        width = widths.pop()
        return (index // width).expand(len(grids), -1), (index % width).expand(len(grids), -1)
    each = to_device(torch.tensor([w for _, w in grids], device="cpu"), device)[:, None]  # (B, 1)
    return index // each, index % each
