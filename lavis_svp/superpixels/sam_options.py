"""Settings of the SAM superpixels, with FMA-WSSS's values (arXiv 2312.03585, preset l2_nmsf_s1_rsw3 without crops)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LEVELS = 3
"""SAM's outputs per point prompt, in their order: 0 subpart, 1 part, 2 whole."""

PAINT_ORDERS = ("fine_over_coarse", "coarse_over_fine")
UNCOVERED_POLICIES = ("components", "ignore", "nearest", "rest")


@dataclass(frozen=True)
class SamOptions:
    """How SAM's masks are found, chosen and painted into one label map.

    "Share" means share of the picture's pixels (padding does not count). The defaults are meant for an input side of
    1024: at smaller sides edges are wider in proportion, so fewer masks pass ``stability``; lower it there.

    Args:
        points_per_side: the prompts are the cell centres of a grid of this many points a side over the picture.
        chunk: prompts per decoder call; changes memory and speed, the result only by float noise.
        pred_iou: a mask stays if its predicted IoU plus its level's ``level_bonus`` is above this.
        level_bonus: (subpart, part, whole) added to the predicted IoU for that test.
        stability: a mask stays if |logit > offset| / |logit > -offset| is at least this (0 where nothing is > -offset).
        stability_offset: that offset, in logits.
        box_nms: of two masks whose boxes have an IoU above this the one with the lower score goes.
        level_priority: (subpart, part, whole) added to the predicted IoU for that score; 1 puts a level first.
        containment: a finer mask goes if at least this share of *itself* lies in one kept mask of a coarser level
            ("rock, sand, water"); None = off.
        max_container_area: kept masks with a larger share than this do not swallow finer ones; None = all do, as in
            FMA-WSSS, where one huge mask can swallow everything.
        min_area: smaller masks, and regions smaller than this after painting, are dropped (share).
        paint: "fine_over_coarse": fine levels, then small masks, lie on top (TUSS); "coarse_over_fine": whole over
            part over subpart, then the higher predicted IoU (FMA-WSSS).
        uncovered: pixels in no mask: "components": each connected piece of at least ``component_area`` becomes a
            region, the rest has none; "ignore": none; "nearest": that of the nearest region; "rest": one region of all.
        component_area: see ``uncovered`` (share).
        max_regions: beyond this many, regions with the lowest (level, predicted IoU) are dropped, small uncovered
            pieces before them.
    """

    points_per_side: int = 32
    chunk: int = 64
    pred_iou: float = 0.86
    level_bonus: tuple[float, float, float] = (0.0, 0.0, 0.1)
    stability: float = 0.92
    stability_offset: float = 1.0
    box_nms: float = 0.7
    level_priority: tuple[float, float, float] = (0.0, 0.0, 1.0)
    containment: float | None = 0.3
    max_container_area: float | None = 0.4
    min_area: float = 5e-4
    paint: str = "fine_over_coarse"
    uncovered: str = "components"
    component_area: float = 0.01
    max_regions: int = 96

    def __post_init__(self) -> None:
        for name in ("points_per_side", "chunk", "max_regions"):
            if getattr(self, name) < 1:
                raise ValueError(f"SamOptions.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("box_nms", "containment", "max_container_area", "min_area", "component_area"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"SamOptions.{name} must lie in 0..1, got {value}.")
        for name in ("level_bonus", "level_priority"):
            object.__setattr__(self, name, _per_level(name, getattr(self, name)))
        for name, known in (("paint", PAINT_ORDERS), ("uncovered", UNCOVERED_POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"SamOptions.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")


def _per_level(name: str, values: Any) -> tuple[float, ...]:
    """YAML lists become tuples, so that equal options are equal."""
    if len(values) != LEVELS:
        raise ValueError(f"SamOptions.{name} needs {LEVELS} numbers (subpart, part, whole), got {values!r}.")
    return tuple(float(value) for value in values)
