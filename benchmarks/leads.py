"""How far apart two rows of a comparison are, when both were scored on the same expressions with few seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

KINDS = ("attribute", "relation", "superlative")
RESAMPLES, SEED, LEVEL = 2000, 0, 0.95


class Scores:
    """IoUs of one row over seeds and images, summed by image and kind.

    Args:
        ious: one (N,) list a seed, in the order of ``expressions.json``.
        expressions: N of [id, image, kind, pixels of the target].
    """

    def __init__(self, ious: list[list[float]], expressions: list[list[Any]]) -> None:
        images = {image: index for index, image in enumerate(dict.fromkeys(e[1] for e in expressions))}
        row = [images[image] for _, image, *_ in expressions]
        column = [KINDS.index(kind) for _, _, kind, _ in expressions]
        self.sums = np.zeros((len(ious), len(images), len(KINDS)))
        self.counts = np.zeros((len(images), len(KINDS)))
        for seed, values in enumerate(ious):
            np.add.at(self.sums[seed], (row, column), values)
        np.add.at(self.counts, (row, column), 1)

    def by_seed(self) -> np.ndarray:
        """(seeds,) gIoU of each seed on all images."""
        return self._giou(self.sums.sum(1), self.counts.sum(0))  # (seeds,)

    def draws(self, images: np.ndarray) -> np.ndarray:
        """(R,) gIoU, seeds together, of R draws of images, (R, P) indices."""
        return self._giou(self.sums.mean(0)[images].sum(1), self.counts[images].sum(1))  # (R,)

    @staticmethod
    def _giou(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Mean over the kinds, the last axis, of the mean IoU."""
        return (sums / counts).mean(-1)


@dataclass(frozen=True)
class Lead:
    """By how much one row's gIoU is above another's.

    Args:
        point: the difference.
        low: of its 95 % interval.
        high: likewise.
        seeds: whether the interval is over seeds too; over images alone where a row has one seed.
    """

    point: float
    low: float
    high: float
    seeds: bool

    def __str__(self) -> str:
        return f"{self.point:+.3f} ({self.low:+.3f} to {self.high:+.3f}{'' if self.seeds else ' over images'})"


def difference(one: Scores, other: Scores) -> Lead:
    """By how much ``one`` leads ``other``.

    The variance of the difference is that over drawn images, which both share, plus that of each row's seeds; the
    quantile is Student's with Welch and Satterthwaite's degrees of freedom, since seeds are few.
    """
    count = len(one.counts)
    images = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))
    drawn = one.draws(images) - other.draws(images)
    seeds = one.by_seed(), other.by_seed()
    point = float(seeds[0].mean() - seeds[1].mean())
    tail = (1 - LEVEL) / 2
    if min(map(len, seeds)) < 2:
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return Lead(point, float(low), float(high), seeds=False)
    parts = [(drawn.var(ddof=1), count - 1), *((values.var(ddof=1) / len(values), len(values) - 1) for values in seeds)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else 1.0
    half = float(scipy.stats.t.ppf(1 - tail, freedom) * variance**0.5)
    return Lead(point, point - half, point + half, seeds=True)
