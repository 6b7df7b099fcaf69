"""How good a mask made of superpixels can be: the best single region and the best union, per target."""

from __future__ import annotations

import numpy as np

from lavis_svp.superpixels.region_map import RegionMap


def single_ceiling(regions: RegionMap, target: np.ndarray) -> tuple[float, int | None]:
    """The region with the highest IoU with a target mask.

    Args:
        regions: of the same image; brought to the target's size by nearest neighbour.
        target: (H, W) bool or 0/1.

    Returns:
        (IoU, region id); equal IoUs: the lower id. An empty target, or one that no region meets: (0.0, None).
    """
    inside, areas, size = _overlaps(regions, target)
    ious = inside / np.maximum(areas + size - inside, 1)  # (S,)
    best = int(ious.argmax())
    return (float(ious[best]), best) if inside[best] else (0.0, None)


def union_ceiling(regions: RegionMap, target: np.ndarray) -> tuple[float, list[int]]:
    """The set of regions whose union has the highest IoU with a target mask. Exact.

    Regions are disjoint, so the IoU of a union is ``sum(inside) / (target + sum(outside))``: a ratio of sums, which is
    largest for all the regions whose ``inside / outside`` exceeds some bound. So only the prefixes of the regions
    sorted by their share inside the target are tried.

    Args:
        regions: of the same image; brought to the target's size by nearest neighbour.
        target: (H, W) bool or 0/1.

    Returns:
        (IoU, region ids in ascending order), the smallest such set; an empty target: (0.0, []).
    """
    inside, areas, size = _overlaps(regions, target)
    candidates = np.flatnonzero(inside)
    if len(candidates) == 0:
        return 0.0, []
    order = candidates[np.argsort(-inside[candidates] / areas[candidates], kind="stable")]
    ious = inside[order].cumsum() / (size + (areas - inside)[order].cumsum())  # (candidates,)
    best = int(ious.argmax())
    return float(ious[best]), sorted(order[: best + 1].tolist())


def _overlaps(regions: RegionMap, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Pixels of each region inside the target (S,), of each region (S,), and of the target, at the target's size."""
    if target.ndim != 2:
        raise ValueError(f"A target mask is (H, W), got shape {target.shape}.")
    regions = regions.resized((target.shape[0], target.shape[1]))
    mask = target.astype(bool)
    inside = np.bincount(regions.labels[mask] + 1, minlength=regions.count + 1)[1:]  # (S,)
    return inside, regions.areas, int(mask.sum())
