"""SAM's resizing of mask logits to the image as two small matrices: the same function at a fraction of the time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lavis_svp.common.transfer import to_device


class ToImage(NamedTuple):
    """Bilinear from the decoder's frame to SAM's, crop the padding, bilinear to the image: separable and linear.

    ``rows`` are the weights of the decoder's rows in the image's rows, ``columns`` the same of columns.
    """

    rows: Tensor  # (H, h)
    columns: Tensor  # (W, w)

    def __call__(self, logits: Tensor) -> Tensor:
        """Resize logits: (m, h, w), the top-left part of size :attr:`needed`, to (m, H, W)."""
        return self.rows @ (logits @ self.columns.T)

    @property
    def needed(self) -> tuple[int, int]:
        """Size (h, w) of the logits that the image depends on, one pixel into the padding if there is any."""
        return self.rows.shape[1], self.columns.shape[1]


def to_image(
    side: int, low_side: int, input_size: tuple[int, int], original_size: tuple[int, int], device: torch.device | str
) -> ToImage:
    """Build the matrices of one image's size.

    Args:
        side: S, of SAM's square input.
        low_side: side of the decoder's square logits, S / 4.
        input_size: (h_in, w_in) of the image in SAM's input.
        original_size: (H, W) of the image.
        device: where the matrices are used.
    """
    matrices = []
    for inside, outside in zip(input_size, original_size, strict=True):
        weights = bilinear_matrix(outside, inside) @ bilinear_matrix(side, low_side)[:inside]  # (out, low)
        last = int(weights.any(0).nonzero()[-1]) + 1
        matrices.append(to_device(weights[:, :last].float(), device))
    return ToImage(*matrices)


def bilinear_matrix(new: int, old: int) -> Tensor:
    """(new, old) float64 weights of ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``."""
    places = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(min=0)
    low = places.floor().long().clamp(max=old - 1)
    high = (low + 1).clamp(max=old - 1)
    share = places - low
    weights = torch.zeros(new, old, dtype=torch.float64)
    index = torch.arange(new)
    weights[index, low] += 1 - share
    weights[index, high] += share
    return weights
