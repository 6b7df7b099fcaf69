"""The place and size of a mask in seven numbers (centroid, box, area), measured on soft masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_svp.common.tensors import no_autocast

_TOUCHED = 1e-9  # a cell counts from this share on: below it there is only rounding noise


@dataclass(frozen=True)
class MaskGeometry:
    """Measurements of masks, in shares of the field of view's width and height.

    Args:
        centroid: (B, S, 2) x, y.
        box: (B, S, 4) x0, y0, x1, y1.
        area: (B, S) share of the field of view.
    """

    centroid: Tensor
    box: Tensor
    area: Tensor

    def centre_and_size(self) -> Tensor:
        """Return the box as cx, cy, w, h: (B, S, 4)."""
        low, high = self.box[..., :2], self.box[..., 2:]
        return torch.cat([(low + high) / 2, high - low], dim=-1)  # (B, S, 4)

    def numbers(self) -> Tensor:
        """Return centroid, box and area side by side: (B, S, 7)."""
        return torch.cat([self.centroid, self.box, self.area[..., None]], dim=-1)  # (B, S, 7)


def mask_geometry(masks: Tensor) -> MaskGeometry:
    """Measure soft masks (B, S, Hm, Wm) in 0..1 over the field of view, in float32.

    With ``m_ij`` the share of cell (i, j) inside, the area is the mean of m, the centroid the mean of the cells'
    centres weighted by m. The box is finer than the cells (:func:`box_edges`): an axis-aligned rectangle that reaches
    over three cells or more each way comes out exactly, wherever its edges are. An empty mask is measured as one that
    covers everything, as in pooling.
    """
    with no_autocast(masks.device):
        masks = masks.float()
        masks = torch.where((masks > _TOUCHED).flatten(2).any(dim=2)[..., None, None], masks, 1.0)  # (B, S, Hm, Wm)
        total = masks.sum(dim=(2, 3))  # (B, S)
        height, width = masks.shape[2:]
        centres = [(torch.arange(cells, device=masks.device) + 0.5) / cells for cells in (width, height)]  # (cells,)
        x = (masks.sum(dim=2) * centres[0]).sum(dim=2) / total  # (B, S)
        y = (masks.sum(dim=3) * centres[1]).sum(dim=2) / total  # (B, S)
        area = total / (height * width)  # (B, S)
        return MaskGeometry(torch.stack([x, y], dim=-1), box_edges(masks), area)


def box_edges(masks: Tensor) -> Tensor:
    """Measure the boxes of soft masks (B, S, Hm, Wm), none empty: (B, S, 4) x0, y0, x1, y1 in shares of the axes.

    An axis-aligned rectangle has the shares ``m_ij = r_i c_j``, where r and c are the shares of each row's height and
    each column's width that it covers: 1 between its outermost rows and columns. So ``max_i m_ij = c_j max(r)``, and
    the outermost columns give the edges once ``max(r)`` is known; likewise the rows. As ``max(m) = max(r) max(c)``,
    and max(c) is 1 where a column lies between the outermost (max(r), where a row does), it is known for a rectangle
    over three columns or three rows. For one that is smaller both ways, max(r) and max(c) are taken to be equal.

    If both edges lie in the same column, the shares do not say where in it: the mask is laid into the middle. Masks
    of other shapes get boxes that end inside their outermost cells, by the largest share in these.
    """
    columns, rows = masks.amax(dim=2), masks.amax(dim=3)  # (B, S, Wm), (B, S, Hm)
    peak = columns.amax(dim=2)  # (B, S)
    inner = [_reach(profile)[1] - _reach(profile)[0] >= 2 for profile in (columns, rows)]
    even = torch.where(inner[0] | inner[1], 1.0, peak.sqrt())  # where neither max(r) nor max(c) is known
    x0, x1 = _edges(columns, torch.where(inner[0], peak, even))
    y0, y1 = _edges(rows, torch.where(inner[1], peak, even))
    return torch.stack([x0, y0, x1, y1], dim=-1)  # (B, S, 4)


def _reach(profile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last cell of (..., cells) that holds anything: two (...) int64."""
    index = torch.arange(profile.shape[-1], device=profile.device)
    touched = profile > _TOUCHED
    return torch.where(touched, index, profile.shape[-1]).amin(dim=-1), torch.where(touched, index, -1).amax(dim=-1)


def _edges(profile: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """Return start and end along one axis, in shares, of masks covering ``across`` of their best cell of the other."""
    cells = profile.shape[-1]
    first, last = _reach(profile)
    low = (profile.gather(-1, first[..., None])[..., 0] / across).clamp_max(1.0)  # covered of the first cell
    high = (profile.gather(-1, last[..., None])[..., 0] / across).clamp_max(1.0)
    single = first == last
    start = torch.where(single, first + (1 - low) / 2, first + 1 - low)
    end = torch.where(single, first + (1 + low) / 2, last + high)
    return start / cells, end / cells


class GeometryMLP(nn.Module):
    """Linear, GELU, Linear on measurements, after these are scaled from 0..1 to -1..1.

    It computes in the parameters' own dtype also under autocast: bfloat16 would round places to 1/256 of the image.
    """

    def __init__(self, inputs: int, width: int, width_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width_out))

    def forward(self, numbers: Tensor) -> Tensor:
        """Embed measurements in 0..1: (B, S, inputs) to (B, S, width_out)."""
        with no_autocast(numbers.device):
            return self.layers((2 * numbers - 1).to(next(self.parameters()).dtype))


class BoxEmbedding(nn.Module):
    """An MLP of one ``width`` on the box of a mask, (cx, cy, w, h): the cheap stand-in for SSPE."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = GeometryMLP(4, width, width)

    def forward(self, masks: Tensor) -> Tensor:
        """Embed masks in 0..1: (B, S, Hm, Wm) to (B, S, width)."""
        return self.mlp(mask_geometry(masks).centre_and_size())
