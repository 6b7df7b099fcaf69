"""Every preset builds, and the reference one has FMA-WSSS's numbers."""

from __future__ import annotations

import pytest

from lavis_svp.superpixels.sam.options import SamOptions
from lavis_svp.superpixels.sam.presets import PRESETS, preset_options


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_can_be_overridden(name: str) -> None:
    assert preset_options(name, {"chunk": 3}).chunk == 3
    if name != "svp":
        options = preset_options(name, {})
        assert (options.decisions, options.first_stride, options.dtype) == ("full", 1, "float32")
        assert options.uncovered == "ignore" and options.min_area == 0 and options.max_superpixels is None


def test_the_reference_preset() -> None:
    options = preset_options("l2_nmsf_s1_rsw3", {})
    assert (options.points_per_side, options.pred_iou, options.stability, options.box_nms) == (32, 0.86, 0.92, 0.7)
    assert options.level_bonus == (0, 0, 0.1) and options.level_priority == (0, 0, 1)
    assert (options.clean_area, options.containment, options.max_container_area) == (100, 0.3, None)
    assert options.paint == "coarse_over_fine"


def test_svp_is_the_default() -> None:
    assert preset_options("svp", {}) == SamOptions()
