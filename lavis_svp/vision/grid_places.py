"""Where images lie on their patch grids, as the device reads it: arithmetic that a loader's worker does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from lavis_svp.common.tensors import interval_overlap
from lavis_svp.common.transfer import Packed
from lavis_svp.vision.geometry import SamInputGeometry
from lavis_svp.vision.types import Grid

Share = tuple[float, float]
"""A share (of height, of width), from the top left corner."""
Axes = tuple[Tensor, Tensor]
"""(h, H) and (w, W), of a map of H x W pixels over SAM's input: the share of each row of patches that each row of
pixels covers, and the same of columns."""
CACHED_AXES = 256  # area weights kept: two for each shape of image; 24 cells of 1024 pixels are 100 kB


@dataclass
class GridPlaces:
    """Where B images lie on their patch grids; made on the CPU, and moved with the rest of a batch.

    Args:
        spans: (B, 2) float32, the rows and columns of patches that each image covers.
        steps: (B, 2) float32, the height and width of a patch in shares of SAM's side.
        axes: for some maps over SAM's input, by name, B area weights that bring them to the grids.
    """

    spans: Tensor
    steps: Tensor
    axes: dict[str, list[Axes]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> GridPlaces:
        """The same on ``device``, in one copy."""
        if self.spans.device == torch.device(device):
            return self
        moved: GridPlaces = Packed(self).to(device).tree
        return moved


def grid_places(
    geometry: Sequence[SamInputGeometry],
    extents: Sequence[Share],
    grids: Sequence[Grid],
    covered: Sequence[Share] = (),
    maps: Mapping[str, int] | None = None,
) -> GridPlaces:
    """Where B images lie on their patch grids.

    Args:
        geometry: where each lies in SAM's input.
        extents: the share of the patch grid that each covers.
        grids: the (h, w) patch grid of each.
        covered: with ``maps``, the share of SAM's input that the patch grid of each covers.
        maps: names of the square maps over SAM's input that are brought to the grids, and their sides in pixels.
    """
    with torch.device("cpu"):
        inside, shares = torch.tensor([place.extent for place in geometry]), torch.tensor(extents)  # (B, 2) each
        sizes = torch.tensor(grids)  # (B, 2)
        places = GridPlaces(sizes * shares, inside / shares / sizes.float())
    for name, side in (maps or {}).items():
        places.axes[name] = axes_of(grids, covered, (side, side))
    return places


def axes_of(grids: Sequence[Grid], covered: Sequence[Share], size: tuple[int, int]) -> list[Axes]:
    """The area weights that bring maps of ``size``, (H, W), to B grids, each over a share of the map; on the CPU."""
    return [
        (axis_weights(h, share[0], size[0]), axis_weights(w, share[1], size[1]))
        for (h, w), share in zip(grids, covered, strict=True)
    ]


@lru_cache(maxsize=CACHED_AXES)
def axis_weights(cells: int, share: float, pixels: int) -> Tensor:
    """(cells, pixels) share of each cell that each of SAM's pixels covers, for cells over the first ``share`` of them.

    The result is kept, on the CPU; do not change it.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        bounds = torch.arange(cells + 1, dtype=torch.float64) / cells * share
        return interval_overlap(torch.stack([bounds[:-1], bounds[1:]], dim=1), pixels)  # (cells, pixels)
