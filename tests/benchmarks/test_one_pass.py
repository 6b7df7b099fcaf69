"""What the benchmark of superpixels in one pass measures and prints, on small maps and made-up results."""

from __future__ import annotations

import json

import held_out_photos
import numpy as np
import one_pass
import one_pass_tables
import pytest
import results
from one_pass_tables import COUNTS, DEFAULT, EXACT, HELD_OUT, MATCHED, ONE_PASS, SIDES

from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.superpixels import RegionMap, build_superpixels

MASKS = held_out_photos.read_json(held_out_photos.MASKS)


def test_the_held_out_masks_are_those_of_their_prompts():
    prompts = held_out_photos.read_json(held_out_photos.PROMPTS)
    assert len(prompts) == held_out_photos.count() >= 15
    names = {photo: [one["name"] for one in objects] for photo, objects in prompts.items()}
    assert names == {photo: [one["name"] for one in objects] for photo, objects in MASKS.items()}


@pytest.mark.parametrize("photo", MASKS)
def test_a_held_out_mask_lies_in_the_box_of_its_prompt(photo):
    for prompt, stored in zip(held_out_photos.read_json(held_out_photos.PROMPTS)[photo], MASKS[photo], strict=True):
        height, width = stored["mask"]["size"]
        ys, xs = np.nonzero(decode_segmentation(stored["mask"], (height, width)))
        margin = held_out_photos.MARGIN + 0.002  # a pixel
        assert prompt["box"][0] - margin <= xs.min() / width and xs.max() / width <= prompt["box"][2] + margin
        assert prompt["box"][1] - margin <= ys.min() / height and ys.max() / height <= prompt["box"][3] + margin


def test_spots_go_from_a_mask():
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:50] = True
    clean = mask.copy()
    mask[20, 20] = False  # a hole
    mask[2, 2] = True  # a piece
    assert (held_out_photos.without_spots(mask) == clean).all()
    clean[20:30, 20:30] = False  # what is no spot stays
    assert (held_out_photos.without_spots(clean) == clean).all()


@pytest.mark.parametrize("name", ["felzenszwalb", "slic"])
def test_classical_maps_are_made_at_counts(name):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    maps = one_pass.maps_at(build_superpixels(name), image, None, (5, 12))
    assert list(maps) == [DEFAULT, "5", "12"]
    assert maps["5"].count <= maps["12"].count <= 14


def test_a_map_of_the_objects_themselves_is_measured_as_perfect():
    labels = np.zeros((40, 50), int)
    labels[5:20, 5:30] = 1
    labels[25:38, 10:45] = 2
    regions = RegionMap.from_labels(labels)
    row = one_pass.measured(regions, regions, regions, np.stack([labels == 1, labels == 2]))
    assert row == {
        "regions": 3,
        "agreement": [1, 1],
        "exact": [1, 1, 1],
        "objects": [1, 1, 1],
        "single": [1, 1],
        "union": [1, 1],
    }
    whole = one_pass.measured(RegionMap.whole_image((40, 50)), regions, regions, (labels == 1)[None])
    assert whole["objects"] == [1, 0, 0] and whole["single"] == pytest.approx([375 / 2000])
    assert "objects" not in one_pass.measured(regions, regions, regions, None)


def test_maps_and_masks_are_compared_at_one_size():
    assert one_pass.compared_size((853, 1280)) == (341, 512) and one_pass.compared_size((30, 40)) == (30, 40)
    assert one_pass.compared_size((1, 5000)) == (1, 512)


class Fake:
    """Stands for the image encoders and generators: nothing on SAM's embedding is made."""

    def __init__(self) -> None:
        self.made = 0

    def of(self, method):
        self.made += 1
        return build_superpixels(method.generator, **method.options)


def test_what_is_measured_is_stored_by_settings(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    example = one_pass.Example("noise", image, np.ones((1, 48, 64), bool))
    methods = {
        EXACT: one_pass.Method("felzenszwalb", None, {"merge_cost": 0.0}),
        "grid": one_pass.Method("slic", None, {}),
    }
    first = one_pass.measure_image(example, methods, Fake(), tmp_path, keep=True)
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert one_pass.measure_image(example, methods, Fake(), tmp_path, keep=True) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stored
    methods["grid"] = one_pass.Method("slic", None, {"compactness": 1.0})
    one_pass.measure_image(example, methods, Fake(), tmp_path, keep=True)
    changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != stored.get(path)}
    assert changed == {"grid.json"}


# ------------------------------------------------------------------------------------------------------------- tables


def row(regions: int, single: list[float], union: list[float], precision: float, recall: float) -> dict:
    return {
        "regions": regions,
        "agreement": [0.9, 0.8],
        "exact": [0.7, 0.6, 0.5],
        "objects": [precision, recall, 0.4],
        "single": single,
        "union": union,
    }


def image(gain: float) -> dict:
    """The rows of an image on which every one_pass is better by ``gain``, at a recall better by .1."""
    exact = {str(count): row(count, [0.5, 0.7], [0.8, 0.9], 1 / count, 0.5) for count in COUNTS}
    ours = {str(count): row(count, [0.5 + gain, 0.7 + gain], [0.8, 0.9], 1 / count, 0.6) for count in COUNTS}
    matched = {f"{MATCHED} {count}": ours[str(count)] for count in COUNTS}
    rows = {EXACT: {DEFAULT: exact["25"], **exact}}
    return rows | {ONE_PASS.format(side): {DEFAULT: ours["25"], **ours, **matched} for side in SIDES}


IMAGES = {"one": image(0.1), "two": image(0.2)}


def test_a_difference_is_that_of_all_objects_with_an_interval_over_images():
    value, (low, high) = one_pass_tables.difference(IMAGES, "single", ONE_PASS.format(1024), 25)
    assert value == pytest.approx(0.15) and low == pytest.approx(0.1) and high == pytest.approx(0.2)
    assert one_pass_tables.difference(IMAGES, "union", ONE_PASS.format(1024), 25)[0] == pytest.approx(0)


def test_recall_is_compared_at_equal_precision():
    found = one_pass_tables.recall_at_equal_precision(IMAGES, ONE_PASS.format(384), 40)
    assert found == pytest.approx((1 / 40, 0.5, 0.6))
    bare = {"one": {name: {at: {"regions": 3} for at in rows} for name, rows in IMAGES["one"].items()}}
    assert one_pass_tables.recall_at_equal_precision(bare, ONE_PASS.format(384), 40) is None


def test_the_page_holds_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    seconds = dict.fromkeys(one_pass_tables.STAGES, 1.0)
    for side in SIDES:
        seconds[one_pass_tables.ENCODER.format(side)] = 2.0
        seconds |= {f"{ONE_PASS.format(side)}: {half}": 0.5 for half in ("head", "hierarchy")}
    run = {"command": "python x", "date": "2026-11-30T00", "machine": {"cpus": 2, "threads": 2, "torch": "2"}}
    found = {"times": {"chelsea": seconds}, "memory": {"slic": 3.0}, "quality": {HELD_OUT: IMAGES}}
    content = {name: {"run": run, "found": found[name]} for name in one_pass.SECTIONS}
    (tmp_path / "one_pass.json").write_text(json.dumps(content))
    page = one_pass_tables.one_pass()
    for text in ("Held-out photos** (2 images, 4 objects", "+0.150 [+0.100, +0.200]", "0.600 (0.500) at 0.025"):
        assert text in page, text
    line = one_pass_tables.summary(content)
    assert line["of_encoder_1024"] == 0.5 and line["single_gain"] == [0.15] * 6 and line["photos"] == 2
