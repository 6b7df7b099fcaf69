"""Quality tests and choice of SAM's masks on hand-made cases, and the clean-up against segment_anything's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.utils.amg import remove_small_regions

from lavis_svp.superpixels.sam.mask_filter import (
    Candidates,
    choose_masks,
    collect_all,
    list_masks,
    pack,
    pack_on_device,
    remove_islands_and_holes,
    score_masks,
)
from lavis_svp.superpixels.sam.options import SamSuperpixelOptions


def screen(logits: torch.Tensor, ious: torch.Tensor, options: SamSuperpixelOptions) -> Candidates:
    scored = score_masks(list_masks(logits, ious, torch.arange(len(ious)), options), options)
    return collect_all([[scored]], [logits.shape[-1]])[0]


def candidates_of(*entries: tuple[tuple[slice, slice], float, int]) -> Candidates:
    """From (rows and columns of a rectangle, predicted IoU, level), on 20 x 20."""
    masks = np.zeros((len(entries), 20, 20), bool)
    for mask, (where, _, _) in zip(masks, entries, strict=True):
        mask[where] = True
    logits = torch.full((len(entries), 3, 20, 20), -9.0)
    ious = torch.zeros(len(entries), 3)
    for i, (_, iou, level) in enumerate(entries):
        logits[i, level] = torch.from_numpy(np.where(masks[i], 9.0, -9.0)).float()
        ious[i, level] = iou
    return screen(logits, ious, SamSuperpixelOptions(pred_iou=0.5, min_area=0))


def box(y0: int, y1: int, x0: int, x1: int) -> tuple[slice, slice]:
    return slice(y0, y1), slice(x0, x1)


def test_rock_sand_water_by_hand() -> None:
    candidates = candidates_of(
        (box(0, 10, 0, 10), 0.9, 2),  # 0 a rock
        (box(0, 5, 0, 5), 0.9, 1),  # 1 sand inside the rock: goes
        (box(8, 18, 0, 10), 0.9, 1),  # 2 sand with 0.2 of itself in the rock: stays
        (box(7, 17, 12, 18), 0.9, 1),  # 3 sand beside it: stays
        (box(12, 14, 2, 4), 0.9, 0),  # 4 water inside sand 2: goes
        (box(1, 3, 6, 8), 0.9, 0),  # 5 water inside the rock: goes, though sand 1 went too
        (box(1, 4, 12, 15), 0.9, 0),  # 6 water beside all: stays
    )
    options = SamSuperpixelOptions(max_container_area=None)
    assert sorted(choose_masks(candidates, options).points) == [0, 2, 3, 6]
    all_of_them = choose_masks(candidates, SamSuperpixelOptions(containment=None))
    assert sorted(all_of_them.points) == list(range(7))


def test_a_giant_container_does_not_swallow() -> None:
    candidates = candidates_of((box(0, 20, 0, 15), 0.9, 2), (box(0, 5, 0, 5), 0.9, 0))
    assert len(choose_masks(candidates, SamSuperpixelOptions(max_container_area=None))) == 1
    assert len(choose_masks(candidates, SamSuperpixelOptions(max_container_area=0.4))) == 2
    assert len(choose_masks(candidates, SamSuperpixelOptions(max_container_area=0.75))) == 1


def test_a_whole_beats_a_surer_part_in_nms() -> None:
    candidates = candidates_of((box(0, 10, 0, 10), 0.6, 2), (box(0, 10, 0, 9), 1.0, 1))
    assert choose_masks(candidates, SamSuperpixelOptions(containment=None)).levels.tolist() == [2]
    flat = SamSuperpixelOptions(containment=None, level_priority=(0, 0, 0))
    assert choose_masks(candidates, flat).levels.tolist() == [1]


def test_equal_scores_go_to_the_smaller_area_then_the_first_point() -> None:
    candidates = candidates_of((box(0, 10, 0, 10), 0.9, 2), (box(0, 10, 0, 9), 0.9, 2), (box(0, 10, 0, 9), 0.9, 2))
    assert choose_masks(candidates, SamSuperpixelOptions()).points.tolist() == [1]


def test_screen_applies_each_threshold() -> None:
    logits = torch.full((6, 3, 10, 10), -9.0)
    logits[:, :, :5, :4] = 9.0  # 20 pixels
    ious = torch.full((6, 3), 0.87)
    ious[0] = 0.8  # only the whole passes, by its bonus
    logits[1, :, 5, :2] = 0.5  # 20 of 22 pixels above the offset: stability 0.909
    logits[2] = -9.0  # empty
    logits[3, :, 9, 9] = float("nan")
    logits[4, :, 9, 9] = float("inf")
    logits[5, 0, 1:, :] = -9.0  # 4 pixels
    kept = screen(logits, ious, SamSuperpixelOptions(min_area=0.05))
    assert list(zip(kept.points.tolist(), kept.levels.tolist(), strict=True)) == [(0, 2), (5, 1), (5, 2)]
    assert kept.areas.tolist() == [20] * 3 and kept.boxes.tolist() == [[0, 0, 3, 4]] * 3
    assert kept.ious == pytest.approx([0.8, 0.87, 0.87])


@pytest.mark.parametrize("prompts", [0, 3])
def test_nothing_passes(prompts: int) -> None:
    nothing = screen(torch.full((prompts, 3, 4, 5), -9.0), torch.ones(prompts, 3), SamSuperpixelOptions())
    assert len(nothing) == 0 and len(choose_masks(nothing, SamSuperpixelOptions())) == 0


def test_a_box_one_pixel_wide_has_no_area_as_in_segment_anything() -> None:
    line = box(0, 10, 3, 4)
    assert len(choose_masks(candidates_of((line, 0.9, 2), (line, 0.8, 2)), SamSuperpixelOptions(containment=None))) == 2


def test_granularity_keeps_what_the_containment_filter_would_drop_and_says_so() -> None:
    candidates = candidates_of((box(0, 10, 0, 7), 0.9, 2), (box(0, 5, 0, 5), 0.9, 1), (box(12, 15, 0, 5), 0.9, 0))
    dial = choose_masks(candidates, SamSuperpixelOptions(granularity=1.0, max_container_area=None))
    assert dial.points.tolist() == [0, 1, 2] and dial.contained.tolist() == [False, True, False]
    assert choose_masks(candidates, SamSuperpixelOptions(max_container_area=None)).points.tolist() == [0, 2]


def test_cleaned_masks_are_compared_once_more_and_untouched_ones_come_first() -> None:
    ring = np.zeros((20, 20), bool)
    ring[:12, :12] = True
    ring[5, 5] = False
    logits = torch.full((2, 3, 20, 20), -9.0)
    logits[0, 2] = torch.from_numpy(np.where(ring, 9.0, -9.0)).float()
    ring[19, 19] = True  # its box is another: both pass the first NMS
    logits[1, 2] = torch.from_numpy(np.where(ring, 9.0, -9.0)).float()
    candidates = screen(logits, torch.tensor([[0, 0, 0.95], [0, 0, 0.9]]), SamSuperpixelOptions(pred_iou=0.5))
    assert len(choose_masks(candidates, SamSuperpixelOptions())) == 2
    cleaned = choose_masks(candidates, SamSuperpixelOptions(clean_area=4))
    assert cleaned.areas.tolist() == [144] and cleaned.points.tolist() == [0]
    assert (
        len(choose_masks(candidates, SamSuperpixelOptions(clean_area=4), image_scale=4.0)) == 2
    )  # a quarter of the pixels


@pytest.mark.parametrize("width", [1, 7, 8, 13])
def test_packing_on_a_device_equals_numpys(width: int) -> None:
    masks = torch.from_numpy(np.random.default_rng(width).random((3, 5, width)) < 0.5)
    packed = pack_on_device(masks)
    assert torch.equal(packed, pack(masks))
    assert np.array_equal(np.unpackbits(packed.numpy(), axis=2, count=width), masks.numpy())


@pytest.mark.parametrize("least", [1, 4, 30, 1000])
def test_equals_segment_anything(least: int) -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([np.kron(rng.random((9, 12)) < share, np.ones((2, 3))) > 0 for share in (0.2, 0.5, 0.8, 0.9)])
    masks[0, 5, 7] ^= True
    cleaned, edited = remove_islands_and_holes(masks, least)
    for mask, new, changed in zip(masks, cleaned, edited, strict=True):
        expected, _ = remove_small_regions(mask, least, "holes")
        expected, _ = remove_small_regions(expected, least, "islands")
        assert np.array_equal(new, expected) and changed == (expected != mask).any()


def test_nothing_in_nothing_out() -> None:
    cleaned, edited = remove_islands_and_holes(np.zeros((0, 4, 5), bool), 10)
    assert cleaned.shape == (0, 4, 5) and edited.shape == (0,)
