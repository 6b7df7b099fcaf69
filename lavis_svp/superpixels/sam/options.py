"""Settings of the SAM superpixels: how masks are found, how exactly, and how they become one region map; presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lavis_svp.common.options import build_options, check_fields, check_whole_number
from lavis_svp.common.registry import unknown_name

LEVELS = 3
"""SAM's masks per point prompt, in the decoder's order: 0 subpart, 1 part, 2 whole."""

OverlapOrder = Literal["fine_over_coarse", "coarse_over_fine"]
Unlabelled = Literal["components", "ignore", "nearest", "rest"]

_SHARES = ("box_nms", "containment", "max_container_area", "min_area", "component_area", "granularity")
_MINIMUM = {"points_per_side": 1, "first_stride": 1, "max_superpixels": 1, "clean_area": 0}

CPU_CHUNK = 16
"""Prompts per decoder call at side 1024 whose tensors fit a CPU's caches; 8 to 32 differ by a tenth."""

GPU_CHUNK = 128
"""The same on other devices: the default grid takes 2 to 8 calls an image, and a call 1.1 GB."""


@dataclass(frozen=True)
class SamSuperpixelOptions:
    """How SAM's masks are found, chosen and merged into one region map.

    A "share" is a share of the image's pixels; padding does not count. The defaults are the paper's filter, tuned for
    SAM's published input side of 1024. At smaller sides edges are wider in proportion, so fewer masks pass
    ``stability``: lower it there.

    Which masks are kept:

    Args:
        points_per_side: SAM is prompted at the cell centres of a grid with this many points per side; 64 finds smaller
            things than 32.
        pred_iou: a mask passes if its predicted IoU plus its level's ``level_bonus`` is above this.
        level_bonus: (subpart, part, whole), added to the predicted IoU in that test.
        stability: a mask passes if |logit > offset| / |logit > -offset| is at least this.
        stability_offset: that offset, in logits.
        box_nms: of two masks whose boxes have an IoU above this, the one with the lower score is dropped.
        level_priority: (subpart, part, whole), added to the predicted IoU to give that score; 1 puts a level first.
        clean_area: islands and holes with fewer pixels *of the image* are removed from the masks that box NMS keeps,
            and the boxes are compared once more, as segment_anything does for min_mask_region_area; 0 = off.
        containment: a finer mask is dropped if at least this share of *itself* lies in one kept mask of a coarser
            level (the "rock, sand, water" filter of FMA-WSSS); None = off.
        max_container_area: kept masks with a larger share than this do not make finer ones drop out; None = all do, as
            in FMA-WSSS, where one huge mask can swallow everything.

    How they are computed. ``decoder`` and ``chunk`` change the result by float noise only; the others approximate:

        decoder: "factored", which is exact at a sixth of the time (:mod:`.factored_decoder`), or "plain",
            segment_anything's own.
        decisions: the resolution at which masks are tested, compared and laid into the map: "full" is the image's
            size, as in segment_anything; "low" is the decoder's own, a quarter of SAM's side (98 % of the verdicts
            are the same).
        first_stride: the first pass prompts every n-th point of every n-th row of the grid; a second pass prompts
            those of the other points that no mask covers yet. 1 = the whole grid at once.
        dtype: number type of the decoder's large products. In "bfloat16" positions, norms, the IoU head and all
            decisions stay float32. "auto" is bfloat16 on a CUDA device that has it, and float32 elsewhere; stores of
            both are one, under the name of "float32", so that what one device has made serves another.
        chunk: prompts per decoder call at side 1024; smaller sides get proportionally more. Memory grows with it.
            "auto" is 16 on a CPU and 128 elsewhere.

    How they become a region map, in this order:

        overlap_order: where masks overlap, "fine_over_coarse" puts fine levels, then small masks on top (TUSS);
            "coarse_over_fine" puts whole over part over subpart, then the higher predicted IoU (FMA-WSSS).
        min_area: smaller masks, and regions of which less than this stays visible, are dropped (share).
        unlabelled: what becomes of pixels in no mask. "components": each connected piece of at least
            ``component_area`` becomes a region, the rest stays without; "ignore": they stay without; "nearest": they
            join the nearest region; "rest": together they become one region.
        component_area: see ``unlabelled`` (share).
        granularity: a dial from 0, about ten regions, to 1, every region that the masks allow. The containment filter
            then drops nothing, but its verdict decides which regions merge first (:func:`.label_map.merge_to_count`).
            A lower value never gives more regions, and its regions are unions of those of a higher one. None = the
            containment filter drops masks.
        max_superpixels: the token budget: regions beyond this many are merged in the same order; None = no limit.
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

    decoder: Literal["factored", "plain"] = "factored"
    decisions: Literal["low", "full"] = "low"
    first_stride: int = 2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    chunk: int | Literal["auto"] = "auto"

    overlap_order: OverlapOrder = "fine_over_coarse"
    min_area: float = 5e-4
    unlabelled: Unlabelled = "components"
    component_area: float = 0.01
    granularity: float | None = None
    max_superpixels: int | None = 96

    RENAMED_KEYS: ClassVar[dict[str, str]] = {"paint": "overlap_order", "uncovered": "unlabelled"}
    REMOVED_KEYS: ClassVar[dict[str, Any]] = {"explaining_area": 1.0}

    def __post_init__(self) -> None:
        check_fields(self)
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"SamSuperpixelOptions.{name} must be at least {minimum}, got {value}.")
        if self.chunk != "auto":
            check_whole_number("SamSuperpixelOptions.chunk (or auto)", self.chunk, 1)
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"SamSuperpixelOptions.{name} must lie in 0..1, got {value}.")
        for name in ("level_bonus", "level_priority"):
            value = getattr(self, name)
            if len(value) != LEVELS:
                raise ValueError(
                    f"SamSuperpixelOptions.{name} needs {LEVELS} numbers (subpart, part, whole), got {value!r}."
                )
            # a YAML list of integers equals the default's tuple, in settings() too
            object.__setattr__(self, name, tuple(map(float, value)))

    def settings(self) -> dict[str, Any]:
        """The options that change the result, under the names that release 0.1 wrote into stores and their digests.

        ``dtype: auto`` counts as float32, its value at that time.
        """
        options = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("decoder", "chunk")}
        options["dtype"] = "float32" if self.dtype == "auto" else self.dtype
        for old, new in self.RENAMED_KEYS.items():
            options[old] = options.pop(new)
        return {**options, **self.REMOVED_KEYS}

    def prompts_per_call(self, device_type: str) -> int:
        """Prompts per decoder call at side 1024 on a kind of device ("cpu", "cuda" …), see ``chunk``."""
        if self.chunk != "auto":
            return self.chunk
        return CPU_CHUNK if device_type == "cpu" else GPU_CHUNK


PRESETS: dict[str, dict[str, Any]] = {
    "svp": {},
    "exact": {"decisions": "full", "first_stride": 1, "dtype": "float32"},
    "l2_nmsf_s1_rsw3": {
        "clean_area": 100,
        "max_container_area": None,
        "decisions": "full",
        "first_stride": 1,
        "dtype": "float32",
        "overlap_order": "coarse_over_fine",
        "min_area": 0.0,
        "unlabelled": "ignore",
        "max_superpixels": None,
    },
}
"""Named sets of options. ``svp``: the defaults. ``exact``: the same without its two approximations, about five times
slower. ``l2_nmsf_s1_rsw3``: the exact production setting of FMA-WSSS (arXiv 2312.03585), which the paper's superpixels
follow, but without its four image crops: one shared embedding has none."""


def preset_options(preset: str, overrides: dict[str, Any]) -> SamSuperpixelOptions:
    """Build a preset's options.

    Args:
        preset: one of :data:`PRESETS`.
        overrides: options that replace the preset's; the names of release 0.1 work with a warning.

    Raises:
        UnknownNameError: no such preset; the message lists them.
        ValueError: an unknown option, or a value out of range.
    """
    if preset not in PRESETS:
        raise unknown_name("superpixel preset", preset, PRESETS)
    return build_options(SamSuperpixelOptions, {**PRESETS[preset], **overrides}, "the options of superpixels 'sam'")
