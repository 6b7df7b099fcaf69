"""Named sets of SAM superpixel options, as FMA-WSSS (arXiv 2312.03585) and segment_anything use them, and ours.

FMA-WSSS's own settings run SAM on the image and on four crops of it. On one shared embedding there are no crops, so
every preset here is the one of that name without them.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from lavis_svp.common.options import build_options
from lavis_svp.common.registry import unknown_name
from lavis_svp.superpixels.sam.options import SamOptions

_OFFICIAL: dict[str, Any] = {
    "level_bonus": (0.0, 0.0, 0.0),
    "level_priority": (0.0, 0.0, 0.0),
    "containment": None,
    "max_container_area": None,
    "decisions": "full",
    "first_stride": 1,
    "uncovered": "ignore",
    "min_area": 0.0,
    "max_superpixels": None,
}
"""segment_anything's generator takes every decision at the image's size, and knows no levels."""

_HEAVY = {**_OFFICIAL, "pred_iou": 0.86, "stability": 0.92, "clean_area": 100}
_LEVELS = {
    **_HEAVY,
    "level_bonus": (0.0, 0.0, 0.1),
    "level_priority": (0.0, 0.0, 1.0),
    "paint": "coarse_over_fine",
}

PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "svp": {},
        "official_default": {**_OFFICIAL, "pred_iou": 0.88, "stability": 0.95},
        "official_heavy": _HEAVY,
        "l2_nmsf_s1": _LEVELS,
        "l2_nmsf_s1_rsw3": {**_LEVELS, "containment": 0.3},
    }
)
"""``svp``: the defaults of :class:`SamOptions`. The others take no approximation; the speed-ups are options of their
own (``decisions: low``, ``first_stride: 2``). ``l2_nmsf_s1_rsw3`` is FMA-WSSS's production setting: the whole
level gets +0.1 in the IoU test and comes first in NMS; a finer mask needs 70 % of itself outside each coarser one."""


def preset_options(preset: str, overrides: dict[str, Any]) -> SamOptions:
    """A preset's options, some of them overridden.

    Raises:
        UnknownNameError: no such preset; the message lists them.
        ValueError: an unknown option, or a value out of range.
    """
    if preset not in PRESETS:
        raise unknown_name("superpixel preset", preset, PRESETS)
    return build_options(SamOptions, {**PRESETS[preset], **overrides}, "the options of superpixels 'sam'")
