"""Records of scored expressions, made by hand."""

import pytest


@pytest.fixture
def make_record():
    def make(expression_id="e0", intersection=0, pred_area=0, gt_area=0, image_id=0, kind="attribute", **fields):
        """A record as the task writes it; without a true area it is one of no target."""
        return {
            "expression_id": expression_id,
            "image_id": image_id,
            "file_name": f"{image_id}.png",
            "split": "test",
            "kind": kind,
            "expression": f"thing {expression_id}",
            "has_target": gt_area > 0,
            "mode": "generative",
            "answered": pred_area > 0,
            "text": "",
            "intersection": intersection,
            "union": pred_area + gt_area - intersection,
            "pred_area": pred_area,
            "gt_area": gt_area,
            "score": 1.0,
            "tokens": 10,
            "pick_correct": None,
            "ceiling_single": 1.0,
            "ceiling_union": 1.0,
            "baseline_random": None,
            "baseline_attribute": None,
            "ms": 5.0,
            **fields,
        }

    return make


@pytest.fixture
def four_cases(make_record):
    """The four cases of empty and not empty, with areas that tell them apart."""
    return [
        make_record("both empty", kind="no_target", image_id=0),
        make_record("false alarm", pred_area=30, kind="no_target", image_id=1),
        make_record("missed", gt_area=50, image_id=2),
        make_record("found", intersection=40, pred_area=60, gt_area=80, image_id=3),
    ]
