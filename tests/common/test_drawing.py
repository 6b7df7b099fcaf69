"""Panels of ordinary and odd pictures; inputs stay as they are; files are whole."""

import numpy as np
import pytest
from PIL import Image

from lavis_svp.common.drawing import (
    BORDER_COLOUR,
    GAP,
    PREDICTED_COLOUR,
    borders,
    contact_sheet,
    draw_mask,
    draw_regions,
    panel,
    region_colours,
    save_png,
)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def test_colours_are_fixed_and_differ():
    colours = region_colours(60)
    assert np.array_equal(colours[:10], region_colours(10))
    assert len(np.unique(colours, axis=0)) == 60
    assert region_colours(0).shape == (0, 3)


def test_borders_lie_between_labels():
    labels = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    assert borders(labels).tolist() == [[False, True, False], [True, True, True], [False, False, False]]


def test_regions_colour_only_regions_and_leave_the_input(picture):
    before = picture.copy()
    labels = np.full((30, 40), -1, np.int32)
    labels[5:15, 10:20] = 0
    drawn = draw_regions(picture, labels)
    assert np.array_equal(picture, before)
    outside = (labels < 0) & ~borders(labels)
    assert np.array_equal(drawn[outside], picture[outside])
    assert (drawn[borders(labels)] == BORDER_COLOUR).all()
    assert not np.array_equal(drawn[7:12, 12:18], picture[7:12, 12:18])


def test_labels_of_another_resolution_cover_the_same_place(picture):
    labels = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(draw_regions(picture, labels), draw_regions(picture, np.kron(labels, np.ones((10, 10), int))))


def test_mask_shows_the_inside_and_darkens_the_outside(picture):
    before = picture.copy()
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20] = 1
    drawn = draw_mask(picture, mask)
    assert np.array_equal(picture, before)
    assert np.array_equal(drawn[12:18, 12:18], picture[12:18, 12:18])
    assert (drawn[22:] <= np.ceil(0.35 * picture[22:])).all()
    assert (drawn[15, 19] == PREDICTED_COLOUR).all()  # the border, the last column inside
    assert (draw_mask(picture, 0 * mask) <= np.ceil(0.35 * picture)).all()
    assert np.array_equal(draw_mask(picture, mask | 1), picture)


@pytest.mark.parametrize("size", [(30, 40), (1, 1), (200, 8000), (8000, 200)], ids=str)
def test_panel_of_any_picture(size):
    picture = np.full((*size, 3), 90, np.uint8)
    labels = np.zeros(size, np.int32)
    mask = np.ones(size, np.uint8)
    with_truth = panel(picture, labels, mask, mask, "the grey thing", side=64)
    demo = panel(picture, labels, mask, caption="the grey thing", side=64)
    assert with_truth.width == 4 * 64 + 5 * GAP
    assert demo.width == 3 * 64 + 4 * GAP
    assert np.asarray(with_truth).min() < 200  # something is drawn on the white paper


def test_panel_of_nothing_found_and_no_superpixels(picture):
    nothing = np.zeros((30, 40), np.uint8)
    assert panel(picture, None, nothing, nothing, "", side=64).width == 3 * 64 + 4 * GAP


@pytest.mark.parametrize("caption", ["word " * 2000, "w" * 5000, "<image> [SEG]", "naïve 猫\nIoU 0.50", ""])
def test_captions_stay_within_the_sheet(picture, caption):
    labels = np.zeros((30, 40), np.int32)
    sheet = panel(picture, labels, labels, None, caption, side=64)
    assert sheet.height < 64 + 150
    assert (np.asarray(sheet)[:, -GAP // 2 :] == 255).all()  # nothing runs into the margin


def test_other_arrays_than_pictures_are_refused(picture):
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, got \(30, 40, 3\) float64"):
        panel(picture / 255, None, np.zeros((30, 40)))
    with pytest.raises(ValueError, match=r"\(H, W\), got shape \(1, 30, 40\)"):
        draw_mask(picture, np.zeros((1, 30, 40)))


def test_contact_sheet_holds_all_panels():
    panels = [Image.new("RGB", (20 + index, 10), (index, 0, 0)) for index in range(5)]
    sheet = contact_sheet(panels, columns=2)
    assert sheet.size == (22 + 23 + GAP, 3 * 10 + 2 * GAP)
    assert sheet.getpixel((0, 2 * (10 + GAP))) == (4, 0, 0)
    with pytest.raises(ValueError, match="0 panels and 1 columns"):
        contact_sheet([])


def test_saved_picture_reads_back_and_leaves_no_rest(tmp_path, picture):
    path = save_png(tmp_path / "deep" / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
