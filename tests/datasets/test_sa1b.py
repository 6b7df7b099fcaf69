"""SA-1B's masks as nested label maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lavis_svp.common.files import BrokenFileError
from lavis_svp.datasets.masks import encode_mask
from lavis_svp.datasets.sa1b import MAX_MASKS, sa1b_labels
from lavis_svp.superpixels.one_pass.head import LEVELS
from lavis_svp.superpixels.one_pass.labels import nested_maps

SIZE = (30, 40)
PIXELS = np.zeros((*SIZE, 3), np.uint8)


def write(folder: Path, content: Any) -> Path:
    (folder / "sa_7.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "sa_7.jpg"


def annotations(masks: list[np.ndarray]) -> dict[str, Any]:
    """As SA-1B writes them, with entries that are not read."""
    rows = [
        {"id": number, "segmentation": encode_mask(mask), "predicted_iou": 0.9, "area": int(mask.sum())}
        for number, mask in enumerate(masks)
    ]
    return {"image": {"image_id": 7, "file_name": "sa_7.jpg", "height": 30, "width": 40}, "annotations": rows}


def test_masks_become_nested_maps(tmp_path: Path) -> None:
    masks = [np.random.default_rng(number).random(SIZE) < 0.4 for number in range(14)]
    labels = sa1b_labels(write(tmp_path, annotations(masks)), PIXELS)
    assert np.array_equal(labels, nested_maps(masks, SIZE))


def test_large_images_have_maps_of_256_cells(tmp_path: Path) -> None:
    mask = np.zeros((400, 1024), bool)
    mask[:200, 512:] = True
    labels = sa1b_labels(write(tmp_path, annotations([mask])), np.zeros((400, 1024, 3), np.uint8))
    assert labels.shape == (LEVELS, 100, 256)
    inside = labels[-1, 0, -1]
    assert np.array_equal(labels[-1] == inside, mask[2::4, 2::4])


def test_an_image_without_masks_is_one_region(tmp_path: Path) -> None:
    assert not sa1b_labels(write(tmp_path, annotations([])), PIXELS).any()


OTHER_SIZE = annotations([np.ones((4, 4), bool)])
LONG_RUN = {"annotations": [{"segmentation": {"size": [30, 40], "counts": [0, 10**12]}}]}
ODD_TEXT = {"annotations": [{"segmentation": {"size": [30, 40], "counts": "\u00ff\u00ff"}}]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        '{"annotations": 3}',
        '{"annotations": [3]}',
        '{"annotations": [{"segmentation": 3}]}',
        OTHER_SIZE,
        LONG_RUN,
        ODD_TEXT,
        {"annotations": [{}] * (MAX_MASKS + 1)},
    ],
)
def test_damaged_or_hostile_annotations_are_refused_in_a_line(tmp_path: Path, content: Any) -> None:
    image = write(tmp_path, content)
    with pytest.raises(BrokenFileError, match="sa_7.json") as raised:
        sa1b_labels(image, PIXELS)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_masks_that_cut_an_image_into_too_many_regions_are_named(tmp_path: Path) -> None:
    size = (256, 256)
    masks = list(np.random.default_rng(0).random((20, *size)) < 0.5)
    with pytest.raises(BrokenFileError, match=r"sa_7.json cut the image into \d{5} regions; the limit is 32768"):
        sa1b_labels(write(tmp_path, annotations(masks)), np.zeros((*size, 3), np.uint8))


def test_missing_annotations_are_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenFileError, match=r"There is no .*sa_7\.json"):
        sa1b_labels(tmp_path / "sa_7.jpg", PIXELS)
