"""Panels of ordinary and odd images; inputs stay as they are; files are whole."""

import numpy as np
import pytest
from PIL import Image

from lavis_svp.common.visualization import (
    BORDER_COLOUR,
    GAP,
    PREDICTED_COLOUR,
    borders,
    contact_sheet,
    cuts_panel,
    draw_mask,
    draw_regions,
    draw_strength,
    panel,
    region_colours,
    regions_panel,
    save_png,
)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def test_colours_are_fixed_and_differ():
    colours = region_colours(60)
    assert np.array_equal(colours[:10], region_colours(10))
    assert len(np.unique(colours, axis=0)) == 60
    assert region_colours(0).shape == (0, 3)


def test_borders_lie_between_labels():
    labels = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    assert borders(labels).tolist() == [[False, True, False], [True, True, True], [False, False, False]]


def test_regions_colour_only_regions_and_leave_the_input(image):
    before = image.copy()
    labels = np.full((30, 40), -1, np.int32)
    labels[5:15, 10:20] = 0
    drawn = draw_regions(image, labels)
    assert np.array_equal(image, before)
    outside = (labels < 0) & ~borders(labels)
    assert np.array_equal(drawn[outside], image[outside])
    assert (drawn[borders(labels)] == BORDER_COLOUR).all()
    assert not np.array_equal(drawn[7:12, 12:18], image[7:12, 12:18])


def test_labels_of_another_resolution_cover_the_same_place(image):
    labels = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(draw_regions(image, labels), draw_regions(image, np.kron(labels, np.ones((10, 10), int))))


def test_mask_shows_the_inside_and_darkens_the_outside(image):
    before = image.copy()
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20] = 1
    drawn = draw_mask(image, mask)
    assert np.array_equal(image, before)
    assert np.array_equal(drawn[12:18, 12:18], image[12:18, 12:18])
    assert (drawn[22:] <= np.ceil(0.35 * image[22:])).all()
    assert (drawn[15, 19] == PREDICTED_COLOUR).all()  # the border, the last column inside
    assert (draw_mask(image, 0 * mask) <= np.ceil(0.35 * image)).all()
    assert np.array_equal(draw_mask(image, mask | 1), image)


@pytest.mark.parametrize("size", [(30, 40), (1, 1), (200, 8000), (8000, 200)], ids=str)
def test_panel_of_any_image(size):
    image = np.full((*size, 3), 90, np.uint8)
    labels = np.zeros(size, np.int32)
    mask = np.ones(size, np.uint8)
    with_truth = panel(image, labels, mask, mask, "the grey thing", side=64)
    demo = panel(image, labels, mask, caption="the grey thing", side=64)
    assert with_truth.width == 4 * 64 + 5 * GAP
    assert demo.width == 3 * 64 + 4 * GAP
    assert np.asarray(with_truth).min() < 200  # something is drawn on the white paper


def test_panel_of_nothing_found_and_no_superpixels(image):
    nothing = np.zeros((30, 40), np.uint8)
    assert panel(image, None, nothing, nothing, "", side=64).width == 3 * 64 + 4 * GAP


@pytest.mark.parametrize(
    "caption",
    ["word " * 2000, "w" * 5000, "<image> [SEG]", "naïve 猫\nIoU 0.50", "", "w" * 10**6, "\ud800"],
    ids=lambda text: repr(text[:9]),
)
def test_captions_stay_within_the_sheet(image, caption):
    labels = np.zeros((30, 40), np.int32)
    sheet = panel(image, labels, labels, None, caption, side=64)
    assert sheet.height < 64 + 150
    assert (np.asarray(sheet)[:, -GAP // 2 :] == 255).all()  # nothing runs into the margin


def test_other_arrays_than_images_are_refused(image):
    with pytest.raises(ValueError, match=r"uint8 and not empty, got \(30, 40, 3\) float64"):
        panel(image / 255, None, np.zeros((30, 40)))
    for bad in (image / 255, image[:0], image[..., 0]):
        with pytest.raises(ValueError, match=r"uint8 and not empty, got \("):
            regions_panel(bad, np.zeros((30, 40), np.int32))
    with pytest.raises(ValueError, match=r"\(H, W\), got shape \(1, 30, 40\)"):
        draw_mask(image, np.zeros((1, 30, 40)))


def test_contact_sheet_holds_all_panels():
    panels = [Image.new("RGB", (20 + index, 10), (index, 0, 0)) for index in range(5)]
    sheet = contact_sheet(panels, columns=2)
    assert sheet.size == (22 + 23 + GAP, 3 * 10 + 2 * GAP)
    assert sheet.getpixel((0, 2 * (10 + GAP))) == (4, 0, 0)
    with pytest.raises(ValueError, match="0 panels and 1 columns"):
        contact_sheet([])


def test_saved_image_reads_back_and_leaves_no_rest(tmp_path, image):
    path = save_png(tmp_path / "deep" / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(path)), image)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_strength_goes_from_white_to_black():
    drawn = draw_strength(np.array([[0.0, 1.0], [0.5, 2.0]], np.float32), (2, 2))
    assert drawn.dtype == np.uint8 and drawn[..., 0].tolist() == [[255, 0], [128, 0]]
    assert draw_strength(np.zeros((3, 5)), (30, 40)).shape == (30, 40, 3)


def test_cuts_stand_beside_the_image_and_the_strength(image):
    before = image.copy()
    labels = [np.arange(count)[None].repeat(3, 0) for count in (1, 2, 4)]
    drawn = cuts_panel(image, np.zeros((8, 10)), labels, "a caption", side=64)
    assert drawn.width == 5 * 64 + 6 * GAP
    assert np.array_equal(image, before)
    row = np.asarray(drawn)[40]
    cells = [row[GAP + index * (64 + GAP) :][:64] for index in range(5)]
    assert (cells[1] == 255).all() and len({cell.tobytes() for cell in cells}) == 5
