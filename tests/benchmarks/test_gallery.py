"""The gallery's draw is honest: at random, by kind, from all that qualify, and shown with its counts."""

from __future__ import annotations

from types import SimpleNamespace

import gallery
import numpy as np
import pytest


def record(number, kind, intersection, image=None):
    return {
        "expression_id": str(number),
        "image_id": number if image is None else image,
        "kind": kind,
        "expression": f"the thing {number}",
        "intersection": intersection,
        "union": 100,
        "answered": True,
        "text": "[SEG]",
    }


RECORDS = [
    *(record(n, "attribute", 90) for n in range(20)),
    *(record(n, "attribute", 10) for n in range(20, 23)),
    *(record(n, "attribute", 50) for n in range(30, 50)),
    *(record(n, "relation", 5) for n in range(50, 60)),
]


def test_successes_and_failures_are_drawn_by_kind_with_their_counts():
    rows = gallery.draw(RECORDS, 2)
    kinds = [[None if one is None else one.record["kind"] for one in row] for row in rows]
    assert kinds == [["attribute", "attribute"]] * 2 + [[None, "relation"]] * 2
    for good, bad in rows[:2]:
        assert gallery.record_iou(good.record) > 0.8 and (good.pool, good.total) == (20, 43)
        assert gallery.record_iou(bad.record) < 0.3 and (bad.pool, bad.total) == (3, 43)
    assert "one of 20 with IoU > 0.8, of 43 attribute" in rows[0][0].label()


def test_the_draw_is_the_same_in_any_order_and_another_with_another_seed():
    def ids(records, seed):
        return [one.record["expression_id"] for row in gallery.draw(records, 2, seed) for one in row if one]

    assert ids(RECORDS, 0) == ids(RECORDS[::-1], 0)
    assert len({tuple(ids(RECORDS, seed)) for seed in range(5)}) > 1
    seen = {name for seed in range(60) for name in ids(RECORDS, seed)}
    assert seen == {str(n) for n in (*range(23), *range(50, 60))}  # each can be drawn, and no other


def test_images_repeat_only_when_there_are_no_others():
    same = [record(n, "attribute", 90, image=n // 10) for n in range(20)]
    for seed in range(5):
        drawn = [row[0].record["image_id"] for row in gallery.draw(same, 3, seed)]
        assert sorted(drawn[:2]) == [0, 1] and len(drawn) == 3


class Images:
    """A data set of one expression per image."""

    def __init__(self):
        self.annotation = [SimpleNamespace(image_id=n) for n in range(60)]

    def leave_out(self, images):
        dropped = {image.image_id for image in images}
        self.annotation = [image for image in self.annotation if image.image_id not in dropped]

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, index):
        number = self.annotation[index].image_id
        return {
            "image_id": number,
            "expression_ids": [str(number)],
            "masks": [np.ones((10, 10), np.uint8)],
            "split": "",
        }

    def collater(self, samples):
        return {key: [sample[key] for sample in samples] for key in samples[0]}

    def pixels(self, image_id, split):
        return np.full((10, 10, 3), image_id, np.uint8)


def model_of(records):
    shares = {row["image_id"]: row["intersection"] for row in records}

    def predict_masks(samples, mode):
        mask = np.zeros(100, np.uint8)
        mask[: shares[samples["image_id"][0]]] = 1
        return [[SimpleNamespace(mask=mask.reshape(10, 10), region_map=None)]]

    return SimpleNamespace(predict_masks=predict_masks)


def test_panels_are_drawn_and_laid_out():
    rows = gallery.draw(RECORDS, 2)
    drawn = [one for row in rows for one in row if one]
    panels = gallery.draw_panels(model_of(RECORDS), Images(), drawn)
    assert set(panels) == {one.record["expression_id"] for one in drawn}
    image, one = gallery.sheet(rows, panels), next(iter(panels.values()))
    assert image.width > 2 * one.width and image.height >= 4 * one.height


def test_records_of_another_model_are_refused():
    other = [{**row, "intersection": 55} for row in RECORDS]
    drawn = [one for row in gallery.draw(RECORDS, 1) for one in row if one]
    with pytest.raises(ValueError, match="another model"):
        gallery.draw_panels(model_of(other), Images(), drawn)
