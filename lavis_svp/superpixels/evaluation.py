"""How good superpixels are: agreement of two maps, ceilings for the masks that can be made of them, and statistics."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lavis_svp.superpixels.region_map import RegionMap, region_ious, region_overlaps

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def agreement(regions: RegionMap, others: RegionMap) -> float:
    """Mean over the pixels of ``regions`` of the best IoU that their region has with any of ``others``.

    1 = ``others``, a map of the same image, contains every region. Not symmetric, as ``others`` may have more regions;
    so look at both ways. The maps are compared at the larger of their sizes, by nearest neighbour; pixels without a
    region count in no area.
    """
    size = (max(regions.size[0], others.size[0]), max(regions.size[1], others.size[1]))
    regions, others = regions.resized(size), others.resized(size)
    both = (regions.labels >= 0) & (others.labels >= 0)
    pairs = regions.labels[both].astype(np.int64) * others.count + others.labels[both]
    common = np.bincount(pairs, minlength=regions.count * others.count).reshape(regions.count, others.count)
    ious = common / (regions.areas[:, None] + others.areas[None] - common)  # (S, S')
    return float((ious.max(1) * regions.areas).sum() / regions.areas.sum())


def single_ceiling(regions: RegionMap, target: np.ndarray) -> tuple[float, int | None]:
    """Find the region with the highest IoU with a target mask.

    Args:
        regions: of the same image; resized to the target by nearest neighbour.
        target: (H, W) bool or 0/1.

    Returns:
        (IoU, region id), of equal IoUs the lower id; (0.0, None) for an empty target, or one that meets no region.
    """
    regions = _at_size_of(target, regions)
    ious = region_ious(regions.labels, target, regions.areas)  # (S,)
    best = int(ious.argmax())
    return (float(ious[best]), best) if ious[best] else (0.0, None)


def union_ceiling(regions: RegionMap, target: np.ndarray) -> tuple[float, list[int]]:
    """Find the set of regions whose union has the highest IoU with a target mask. Exact.

    Regions are disjoint, so the IoU of a union is ``sum(inside) / (target + sum(outside))``. Such a ratio of sums is
    largest for all regions whose ``inside / outside`` exceeds some bound, so only prefixes of the regions sorted by
    their share inside the target need a look.

    Args:
        regions: of the same image; resized to the target by nearest neighbour.
        target: (H, W) bool or 0/1.

    Returns:
        (IoU, region ids in ascending order), the smallest such set; (0.0, []) for an empty target.
    """
    regions = _at_size_of(target, regions)
    inside, areas = region_overlaps(regions.labels, target, regions.count), regions.areas  # (S,), (S,)
    candidates = np.flatnonzero(inside)
    if len(candidates) == 0:
        return 0.0, []
    order = candidates[np.argsort(-inside[candidates] / areas[candidates], kind="stable")]
    ious = inside[order].cumsum() / (np.count_nonzero(target) + (areas - inside)[order].cumsum())  # (candidates,)
    best = int(ious.argmax())
    return float(ious[best]), sorted(order[: best + 1].tolist())


def summarise(maps: Iterable[RegionMap]) -> dict[str, float]:
    """Count the regions of images, and measure how much they cover.

    Returns:
        ``images``, ``regions_mean``, ``regions_p0`` … ``regions_p100``, ``coverage_mean``, ``coverage_min``.

    Raises:
        ValueError: no image.
    """
    rows = [(regions.count, regions.coverage()) for regions in maps]
    if not rows:
        raise ValueError("There are no superpixels to summarise.")
    counts, coverage = (np.array(column, float) for column in zip(*rows, strict=True))
    return {
        "images": len(rows),
        "regions_mean": round(float(counts.mean()), 2),
        **{f"regions_p{percent}": float(np.percentile(counts, percent)) for percent in PERCENTILES},
        "coverage_mean": round(float(coverage.mean()), 4),
        "coverage_min": round(float(coverage.min()), 4),
    }


def _at_size_of(target: np.ndarray, regions: RegionMap) -> RegionMap:
    if target.ndim != 2:
        raise ValueError(f"A target mask is (H, W), got shape {target.shape}.")
    return regions.resized((target.shape[0], target.shape[1]))
