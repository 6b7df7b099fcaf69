"""How good superpixels are: agreement of two maps, boundaries, ceilings for masks that are made of them, statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from lavis_svp.superpixels.region_map import RegionMap, region_ious, region_overlaps

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)

TOLERANCE = 0.0075
"""Distance at which two boundaries are one, as a share of the image's diagonal: that of the Berkeley benchmark (Martin,
Fowlkes and Malik 2004)."""


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


class BoundaryScores(NamedTuple):
    """How well boundaries meet the true contours.

    Args:
        precision: share of the boundary pixels with a contour pixel within the tolerance; 1.0 without boundary pixels.
        recall: share of the contour pixels with a boundary pixel within the tolerance; 1.0 without contour pixels.
    """

    precision: float
    recall: float

    @property
    def f_score(self) -> float:
        """Harmonic mean of precision and recall; 0.0 if both are 0."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def boundary_pixels(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour has another label, (H, W) bool; the image's own edge is none.

    Args:
        labels: (H, W) of any type: region ids, or a mask of one object.
    """
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def tolerance_of(size: tuple[int, int]) -> float:
    """:data:`TOLERANCE` of an image of (H, W), in pixels; at least 1."""
    return max(1.0, TOLERANCE * math.hypot(*size))


def boundary_scores(boundaries: np.ndarray, contours: np.ndarray, tolerance: float) -> BoundaryScores:
    """Compare boundaries with true contours, pixel by pixel.

    A pixel is met if one of the other side lies within the tolerance. Unlike the Berkeley benchmark this asks for no
    one-to-one assignment, so a doubled boundary counts as two right ones; subobject-level tokenization (EPOC, Chen et
    al., arXiv 2402.14327) measures it so, too. Contours of a few annotated objects make the precision a lower bound, to
    be compared at equal counts alone.

    Args:
        boundaries: (H, W) bool, see :func:`boundary_pixels`.
        contours: (H, W) bool, the true ones.
        tolerance: Euclidean distance in pixels, see :func:`tolerance_of`.

    Raises:
        ValueError: the sizes differ, or the tolerance is negative.
    """
    if boundaries.shape != contours.shape or boundaries.ndim != 2:
        raise ValueError(f"Boundaries {boundaries.shape} and contours {contours.shape} must be (H, W) of one size.")
    if not tolerance >= 0:
        raise ValueError(f"The tolerance must be at least 0 pixels, got {tolerance}.")
    return BoundaryScores(_share_near(boundaries, contours, tolerance), _share_near(contours, boundaries, tolerance))


def monosemanticity(regions: RegionMap, contours: np.ndarray, tolerance: float) -> float:
    """Share of the regions that no true contour runs through (EPOC, arXiv 2402.14327).

    A region is eroded by the tolerance: the pixels stay from which every pixel within this distance belongs to it; what
    lies outside the image erodes nothing. It is monosemantic if no contour pixel is among them, so a region that is
    nowhere wider than twice the tolerance is. More regions are purer, so compare at equal counts.

    Args:
        regions: of the same image; resized to the contours by nearest neighbour.
        contours: (H, W) bool, the true ones, see :func:`boundary_pixels`.
        tolerance: Euclidean distance in pixels, see :func:`tolerance_of`.

    Raises:
        ValueError: the contours are not (H, W), or the tolerance is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"The tolerance must be at least 0 pixels, got {tolerance}.")
    labels = _at_size_of(contours, regions).labels
    margin, pure = math.ceil(tolerance) + 1, 0
    crossed = np.zeros(regions.count, bool)  # by a contour, before the erosion
    crossed[labels[contours.astype(bool) & (labels >= 0)]] = True
    for region, place in enumerate(ndimage.find_objects(labels + 1, max_label=regions.count)):
        if crossed[region]:
            rows, cols = (slice(max(0, part.start - margin), part.stop + margin) for part in place)
            inside = labels[rows, cols] == region
            core = ndimage.distance_transform_edt(inside) > tolerance if not inside.all() else inside
            pure += not (core & contours[rows, cols].astype(bool)).any()
    return float((pure + np.count_nonzero(~crossed)) / regions.count)


def _share_near(pixels: np.ndarray, others: np.ndarray, tolerance: float) -> float:
    """The share of ``pixels`` (H, W) with one of ``others`` within the tolerance; 1.0 of none."""
    count = np.count_nonzero(pixels)
    if count == 0 or not others.any():
        return float(count == 0)
    near = ndimage.distance_transform_edt(~others.astype(bool)) <= tolerance
    return float(np.count_nonzero(near & pixels.astype(bool)) / count)


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
