"""What the superpixels of many images are like, in numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lavis_svp.superpixels.region_map import RegionMap

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def summarise(maps: Iterable[RegionMap]) -> dict[str, float]:
    """Count regions and coverage.

    Args:
        maps: of at least one image.

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
