"""From boundary strength to nested regions: watershed, region adjacency graph, merging; any number of them is a cut."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

MARKER_WINDOW = 3
"""Side of the square, in pixels of the label map, in which a marker of the watershed is the lowest."""

SMOOTHING = 0.7
"""Sigma of the Gaussian before markers are sought, in pixels of the label map."""

AFFINITY_SHARE = 0.4
"""Weight of the affinities in the cost of a merge, a geometric mean with the strength of the border."""

SIZE_EXPONENT = 0.12
"""Power of the smaller region's share of the image in the cost of a merge: above 0 slivers go first."""

# Both were chosen by the best region and the best union for the regions of the labels' two coarsest maps, at 10 to 100
# regions, on the images held out of the shipped head's training, at sides 384 and 1024.


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Nested regions of one image: the finest ones, and in which order they merge.

    Every cut is a union of finer regions, and the cut into k regions follows from that into k + 1 by one merge.

    Args:
        labels: (H', W') int32, the finest regions 0..K-1; every pixel has one.
        merges: (K - 1, 2) int64, in order: the region that is kept, and the one that goes into it.
        costs: (K - 1,) float64, what each merge costs; never falls.
    """

    labels: np.ndarray
    merges: np.ndarray
    costs: np.ndarray

    @property
    def count(self) -> int:
        """K, the number of the finest regions."""
        return len(self.merges) + 1

    def count_at(self, cost: float) -> int:
        """The number of regions when all merges that cost less than this are carried out."""
        return self.count - int(np.searchsorted(self.costs, cost))

    def cut(self, count: int) -> np.ndarray:
        """(H', W') labels of ``count`` regions, or of all where there are fewer; their numbers have gaps.

        Raises:
            ValueError: ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"An image has at least one region, asked for {count}.")
        owner = np.arange(self.count)
        for kept, gone in self.merges[: max(0, self.count - count)].tolist()[::-1]:
            owner[gone] = owner[kept]  # from the last merge back: the owner of what is kept is final already
        return owner[self.labels]


def build_hierarchy(strength: np.ndarray, affinities: np.ndarray | None = None, scale: int = 1) -> Hierarchy:
    """Flood the boundary strength from its minima, then merge the regions that the least divides, until one is left.

    Watershed on a learned boundary map follows EPOC (arXiv 2402.14327); merging by the mean strength of borders, with
    costs made monotone, is the ultrametric contour map of Arbelaez et al. 2011.

    Args:
        strength: (H, W) float in 0..1, of the image without padding.
        affinities: (D, h, w) float, see :class:`.head.HeadOutput`, cells of 2 x 2 of the strength's; None: the
            strength alone decides.
        scale: by how much the strength is enlarged first (bilinear), so that regions one cell wide survive.

    Returns:
        Regions at (scale H, scale W).

    Raises:
        ValueError: the numbers are not finite.
    """
    if not np.isfinite(strength).all() or (affinities is not None and not np.isfinite(affinities).all()):
        raise ValueError("The boundary strength is not finite: the image or SAM's embedding holds NaN or infinities.")
    enlarged = _enlarge(np.asarray(strength, np.float32), scale)  # (H', W')
    labels = basins(enlarged)
    means = None
    if affinities is not None:
        means = _region_means(labels, affinities, 2 * scale)
    return merge_regions_by_boundary(labels, enlarged, means)


def basins(strength: np.ndarray) -> np.ndarray:
    """The watershed of a strength (H', W') float32 in 0..1: (H', W') int32 labels 0..K-1, every pixel has one.

    scikit-image floods in the order of the strength; ``benchmarks/watersheds.py`` compares it with scipy's and
    OpenCV's.
    """
    smooth = ndimage.gaussian_filter(strength, SMOOTHING, mode="nearest")
    lowest = ndimage.minimum_filter(smooth, MARKER_WINDOW, mode="nearest") == smooth
    markers, _ = ndimage.label(lowest, structure=np.ones((3, 3)), output=np.int32)
    return watershed(smooth, markers).astype(np.int32) - 1


def merge_regions_by_boundary(
    labels: np.ndarray,
    strength: np.ndarray,
    means: np.ndarray | None = None,
    affinity_share: float = AFFINITY_SHARE,
    size_exponent: float = SIZE_EXPONENT,
) -> Hierarchy:
    """Merge neighbouring regions, the pair with the lowest cost first, until one is left.

    The cost of a pair is ``m^(1 - s) (1 - exp(-|a - b|^2))^s n^e``: m the mean strength along its common border, a and
    b the regions' mean affinities, n the smaller area as a share of the image, s ``affinity_share``, e
    ``size_exponent``. Of equal costs the lower numbers go first, so the result is the same everywhere.

    Args:
        labels: (H', W') int32, ids 0..K-1, all present.
        strength: (H', W') float32.
        means: (K, D) float, the regions' mean affinities; None: the cost is ``m n^e``.
        affinity_share: see above.
        size_exponent: see above.
    """
    count = int(labels.max()) + 1
    area = (np.bincount(labels.ravel(), minlength=count) / labels.size).tolist()
    size = [one**size_exponent for one in area]
    borders = _borders(labels, strength, count)
    share = 0.0 if means is None else affinity_share
    rows = np.zeros((count, 0)) if means is None else means.astype(np.float64)
    places = [tuple(row) for row in rows.tolist()]

    def cost(one: int, other: int) -> float:
        total, length = borders[one][other]
        apart = (1.0 - math.exp(-(math.dist(places[one], places[other]) ** 2))) ** share if share else 1.0
        return float((total / length) ** (1.0 - share) * apart * min(size[one], size[other]))

    queue = [(cost(a, b), a, b, 0, 0) for a in range(count) for b in borders[a] if a < b]
    heapq.heapify(queue)
    version = [0] * count
    merges: list[tuple[int, int]] = []
    costs: list[float] = []
    while queue:
        value, kept, gone, first, second = heapq.heappop(queue)
        if version[kept] != first or version[gone] != second:
            continue  # one of them has changed since
        merges.append((kept, gone))
        costs.append(max(value, costs[-1]) if costs else value)
        total = area[kept] + area[gone]
        if share:
            one, other = area[kept] / total, area[gone] / total
            places[kept] = tuple(one * a + other * b for a, b in zip(places[kept], places[gone], strict=True))
        area[kept], size[kept] = total, total**size_exponent
        version[kept] += 1
        version[gone] = -1
        for neighbour, (sum_gone, length_gone) in borders[gone].items():
            del borders[neighbour][gone]
            if neighbour != kept:
                sum_kept, length_kept = borders[kept].get(neighbour, (0.0, 0))
                border = (sum_kept + sum_gone, length_kept + length_gone)
                borders[kept][neighbour] = borders[neighbour][kept] = border
        borders[gone] = {}
        for neighbour in borders[kept]:
            low, high = (kept, neighbour) if kept < neighbour else (neighbour, kept)
            heapq.heappush(queue, (cost(low, high), low, high, version[low], version[high]))
    return Hierarchy(labels, np.array(merges, np.int64).reshape(-1, 2), np.array(costs))


def _borders(labels: np.ndarray, strength: np.ndarray, count: int) -> list[dict[int, tuple[float, int]]]:
    """For each region its neighbours: the sum of strengths along the common border, and its length in pixel edges."""
    firsts, seconds, values = [], [], []
    for one, other in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        apart = labels[one] != labels[other]
        firsts.append(labels[one][apart])
        seconds.append(labels[other][apart])
        values.append(np.maximum(strength[one][apart], strength[other][apart]))
    first, second = np.concatenate(firsts).astype(np.int64), np.concatenate(seconds).astype(np.int64)
    pairs, inverse = np.unique(np.minimum(first, second) * count + np.maximum(first, second), return_inverse=True)
    totals = np.bincount(inverse, np.concatenate(values).astype(np.float64), len(pairs))
    lengths = np.bincount(inverse, minlength=len(pairs))
    borders: list[dict[int, tuple[float, int]]] = [{} for _ in range(count)]
    for pair, total, length in zip(pairs.tolist(), totals.tolist(), lengths.tolist(), strict=True):
        low, high = divmod(pair, count)
        borders[low][high] = borders[high][low] = total, length
    return borders


def _region_means(labels: np.ndarray, features: np.ndarray, cell: int) -> np.ndarray:
    """The mean features (K, D) of regions; each cell of features (D, h, w) covers cell x cell pixels of the labels."""
    height, width = labels.shape
    flat, count = labels.ravel(), int(labels.max()) + 1
    large = features.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width].reshape(len(features), -1)
    sums = [np.bincount(flat, channel, count) for channel in large]  # D of (K,), over H' * W' pixels
    return np.stack(sums, axis=1) / np.bincount(flat, minlength=count)[:, None]  # (K, D)


def _enlarge(values: np.ndarray, scale: int) -> np.ndarray:
    """Bilinear enlargement (H, W) -> (scale H, scale W), pixel centres on pixel centres."""
    if scale == 1:
        return values
    for axis in (0, 1):
        length = values.shape[axis]
        place = ((np.arange(length * scale) + 0.5) / scale - 0.5).clip(0, length - 1)  # in cells
        low = np.minimum(place.astype(np.int64), max(length - 2, 0))
        share = (place - low).astype(values.dtype)
        share = share[:, None] if axis == 0 else share[None]
        upper = np.minimum(low + 1, length - 1)
        values = values.take(low, axis) * (1 - share) + values.take(upper, axis) * share
    return values
