from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.datasets.refshapes import refcoco_format


def test_annotation_keeps_the_mask_exactly():
    mask = np.random.default_rng(0).random((17, 23)) > 0.7
    entry = refcoco_format.annotation(1, 2, 3, mask, ("red",))
    assert np.array_equal(decode_segmentation(entry["segmentation"], mask.shape), mask)
    assert entry["area"] == mask.sum() and isinstance(entry["segmentation"]["counts"], str)


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="empty mask"):
        refcoco_format.annotation(1, 2, 3, np.zeros((4, 4)), ())


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    refcoco_format.write_json(path, {"old": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(refcoco_format.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        refcoco_format.write_json(path, {"new": 2})
    assert path.read_text() == '{"old": 1}'
    assert list(tmp_path.iterdir()) == [path]


def test_png_is_rgb(tmp_path):
    image = np.zeros((5, 7, 3), np.uint8)
    image[..., 0] = 200
    refcoco_format.write_png(tmp_path / "a" / "red.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "red.png")), image)
