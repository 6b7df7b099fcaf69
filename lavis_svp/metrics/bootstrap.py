"""Bootstrap confidence intervals that resample images, because the expressions of an image are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bootstrap:
    """How confidence intervals are drawn.

    Args:
        resamples: number of resamples of the images.
        seed: of the resamples; the same seed gives the same interval.
        level: 0.95 = from the 2.5th to the 97.5th percentile.

    Raises:
        ValueError: ``resamples`` < 1 or ``level`` outside (0, 1).
    """

    resamples: int = 1000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.level < 1:
            raise ValueError(
                f"A bootstrap needs resamples >= 1 and 0 < level < 1, got {self.resamples} and {self.level}."
            )


DEFAULT_BOOTSTRAP = Bootstrap()


def cluster_sums(
    values: np.ndarray, clusters: Sequence[Hashable], groups: Sequence[Hashable] | None = None
) -> np.ndarray:
    """Sum values by cluster and group.

    Args:
        values: (N,) numbers.
        clusters: N cluster names (the image of each expression).
        groups: N group names (its kind); None = a single group.

    Returns:
        (P, K) float64: P clusters and K groups, both in order of first appearance.
    """
    row = _first_appearance_codes(clusters)
    column = _first_appearance_codes([""] * len(clusters) if groups is None else groups)
    sums = np.zeros((max(row, default=-1) + 1, max(column, default=-1) + 1), np.float64)
    np.add.at(sums, (row, column), np.asarray(values, np.float64))
    return sums


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> tuple[float, float] | None:
    """Percentile interval of mean_k (sum_p numerators[p, k] / sum_p denominators[p, k]).

    For gIoU the numerators are IoU sums and the denominators expression counts; for cIoU they are intersections and
    unions. Several groups k give the mean over groups. Each resample draws P clusters with replacement. A group that
    a resample misses (denominator 0) is left out of that resample's mean.

    Args:
        numerators: (P, K) sums of each cluster and group, by :func:`cluster_sums`.
        denominators: (P, K) likewise.
        bootstrap: number of resamples, their seed, and the level.

    Returns:
        (low, high), or None with fewer than two clusters or no usable resample: there is no spread to see.

    Raises:
        ValueError: the shapes differ.
    """
    if numerators.shape != denominators.shape or numerators.ndim != 2:
        raise ValueError(f"Need two (P, K) tables, got {numerators.shape} and {denominators.shape}.")
    clusters = len(numerators)
    if clusters < 2:
        return None
    rng = np.random.default_rng(bootstrap.seed)
    values = []
    for _ in range(bootstrap.resamples):
        times = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)  # (P,)
        totals = times @ denominators  # (K,)
        present = totals > 0
        if present.any():
            values.append(float(((times @ numerators)[present] / totals[present]).mean()))
    if not values:
        return None
    low, high = np.quantile(values, [(1 - bootstrap.level) / 2, (1 + bootstrap.level) / 2])
    return float(low), float(high)


def _first_appearance_codes(names: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]
