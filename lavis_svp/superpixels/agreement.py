"""How alike two region maps of one image are."""

from __future__ import annotations

import numpy as np

from lavis_svp.superpixels.region_map import RegionMap


def agreement(regions: RegionMap, others: RegionMap) -> float:
    """Mean over the pixels of ``regions`` of the best IoU that their region has with any of ``others``.

    1 = every region is there again. Not symmetric: others may have more regions than these; so look at both ways.
    Compared at the larger of the two sizes, by nearest neighbour; pixels without a region count in no area.

    Args:
        regions: whose regions are looked for.
        others: where they are looked for; of the same image.

    Returns:
        0 to 1.
    """
    size = (max(regions.size[0], others.size[0]), max(regions.size[1], others.size[1]))
    regions, others = regions.resized(size), others.resized(size)
    both = (regions.labels >= 0) & (others.labels >= 0)
    pairs = regions.labels[both].astype(np.int64) * others.count + others.labels[both]
    common = np.bincount(pairs, minlength=regions.count * others.count).reshape(regions.count, others.count)
    ious = common / (regions.areas[:, None] + others.areas[None] - common)  # (S, S')
    return float((ious.max(1) * regions.areas).sum() / regions.areas.sum())
