"""Settings of the SAM superpixels: what is looked for, how fast, and how masks become one label map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LEVELS = 3
"""SAM's outputs per point prompt, in their order: 0 subpart, 1 part, 2 whole."""

DECODERS = ("factored", "plain")
DECISIONS = ("low", "full")
DTYPES = ("float32", "bfloat16")
PAINT_ORDERS = ("fine_over_coarse", "coarse_over_fine")
UNCOVERED_POLICIES = ("components", "ignore", "nearest", "rest")


@dataclass(frozen=True)
class SamOptions:
    """How SAM's masks are found, chosen and painted into one label map.

    "Share" means share of the image's pixels (padding does not count). The defaults are meant for an input side of
    1024: at smaller sides edges are wider in proportion, so fewer masks pass ``stability``; lower it there.
    Named sets of options: :mod:`.presets`.

    What is looked for:

    Args:
        points_per_side: the prompts are the cell centres of a grid of this many points a side over the image; 64 is a
            finer pass for small things.
        pred_iou: a mask stays if its predicted IoU plus its level's ``level_bonus`` is above this.
        level_bonus: (subpart, part, whole) added to the predicted IoU for that test.
        stability: a mask stays if |logit > offset| / |logit > -offset| is at least this (0 where nothing is > -offset).
        stability_offset: that offset, in logits.
        box_nms: of two masks whose boxes have an IoU above this the one with the lower score goes.
        level_priority: (subpart, part, whole) added to the predicted IoU for that score; 1 puts a level first.
        clean_area: islands and holes with fewer pixels *of the image* are removed from the masks that box NMS left,
            and boxes compared once more, as segment_anything's min_mask_region_area; 0 = off.
        containment: a finer mask goes if at least this share of *itself* lies in one kept mask of a coarser level
            ("rock, sand, water"); None = off.
        max_container_area: kept masks with a larger share than this do not swallow finer ones; None = all do, as in
            FMA-WSSS, where one huge mask can swallow everything.

    How it is computed (``decoder`` and ``chunk`` change the result by float noise only, the others approximate):

        decoder: "factored", exact at a sixth of the time (:mod:`.decoders`), or "plain", segment_anything's own.
        decisions: where masks are judged, compared and painted: "full", at the image's size, as segment_anything
            does; "low", at the decoder's own resolution, a quarter of SAM's side, 98 % of verdicts alike.
        first_stride: prompt every n-th point of every n-th row of the grid first, and of the others only those that no
            mask found so far explains. 1 = the whole grid at once.
        max_explaining_area: only masks up to this share explain what they cover; below 1, more of the second points
            are prompted, and small things on large ones are found.
        dtype: of the decoder's large products; in "bfloat16" positions, norms, IoU head and all decisions stay float32.
            Faster on hardware that has bfloat16, far slower on a CPU that has not.
        chunk: prompts per decoder call at side 1024, at smaller sides more in proportion; memory grows with it. 8 to 16
            suit a CPU's caches, 64 and more a GPU.

    How masks become a label map, in this order:

        paint: "fine_over_coarse": fine levels, then small masks, lie on top (TUSS); "coarse_over_fine": whole over
            part over subpart, then the higher predicted IoU (FMA-WSSS).
        min_area: smaller masks, and regions smaller than this after painting, are dropped (share).
        uncovered: pixels in no mask: "components": each connected piece of at least ``component_area`` becomes a
            region, the rest has none; "ignore": none; "nearest": that of the nearest region; "rest": one region of all.
        component_area: see ``uncovered`` (share).
        granularity: a dial from 0, about ten regions, to 1, every region that the candidates allow; the containment
            filter then drops nothing, but says which regions merge first (:mod:`.granularity`). A lower value never
            gives more regions, its regions are unions of a higher one's. None = the containment filter decides.
        max_superpixels: token budget: beyond this many, regions are merged in the same order; None = no limit.
    """

    points_per_side: int = 32
    pred_iou: float = 0.86
    level_bonus: tuple[float, float, float] = (0.0, 0.0, 0.1)
    stability: float = 0.92
    stability_offset: float = 1.0
    box_nms: float = 0.7
    level_priority: tuple[float, float, float] = (0.0, 0.0, 1.0)
    clean_area: int = 0
    containment: float | None = 0.3
    max_container_area: float | None = 0.4

    decoder: str = "factored"
    decisions: str = "low"
    first_stride: int = 2
    max_explaining_area: float = 1.0
    dtype: str = "float32"
    chunk: int = 16

    paint: str = "fine_over_coarse"
    min_area: float = 5e-4
    uncovered: str = "components"
    component_area: float = 0.01
    granularity: float | None = None
    max_superpixels: int | None = 96

    def __post_init__(self) -> None:
        for name in ("points_per_side", "first_stride", "chunk", "max_superpixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"SamOptions.{name} must be at least 1, got {value}.")
        shares = ("box_nms", "containment", "max_container_area", "max_explaining_area", "min_area", "component_area")
        for name in (*shares, "granularity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"SamOptions.{name} must lie in 0..1, got {value}.")
        if self.clean_area < 0:
            raise ValueError(f"SamOptions.clean_area must not be negative, got {self.clean_area}.")
        for name in ("level_bonus", "level_priority"):
            object.__setattr__(self, name, _per_level(name, getattr(self, name)))
        for name, known in (
            ("decoder", DECODERS),
            ("decisions", DECISIONS),
            ("dtype", DTYPES),
            ("paint", PAINT_ORDERS),
            ("uncovered", UNCOVERED_POLICIES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"SamOptions.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")


def _per_level(name: str, values: Any) -> tuple[float, ...]:
    """YAML lists become tuples, so that equal options are equal."""
    if len(values) != LEVELS:
        raise ValueError(f"SamOptions.{name} needs {LEVELS} numbers (subpart, part, whole), got {values!r}.")
    return tuple(float(value) for value in values)
