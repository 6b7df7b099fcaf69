"""Records of set predictions, and predictions that are refused."""

import json
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from lavis_svp.metrics.records import record_line
from lavis_svp.tasks import scoring
from lavis_svp.tasks.scoring import (
    ANSWER_FIELDS,
    merge_modes,
    predictions_by_mode,
    score_image,
    timed_predictions,
)


@pytest.fixture
def batch(images):
    return images.collater([images[0], images[1]])


@pytest.fixture
def answers(images, batch):
    given = images.answers()
    return [[given[name] for name in names] for names in batch["expression_ids"]]


def test_records_of_right_wrong_and_denied(batch, answers):
    right, wrong, denied = score_image(batch, 1, answers[1], "generative", 2.5)
    assert right == {
        "expression_id": "p1e0",
        "image_id": 1,
        "file_name": "1.png",
        "split": "test",
        "kind": "attribute",
        "expression": "the red thing",
        "has_target": True,
        "mode": "generative",
        "answered": True,
        "text": "It is [SEG].",
        "intersection": 24,
        "union": 24,
        "pred_area": 24,
        "gt_area": 24,
        "score": 0.75,
        "tokens": 4,
        "pick_correct": True,
        "pick_inside": 1.0,
        "ceiling_single": 1.0,
        "ceiling_union": 1.0,
        "baseline_random": 0.25,
        "baseline_attribute": 1.0,
        "ms": 2.5,
    }
    assert (wrong["intersection"], wrong["union"], wrong["pick_correct"]) == (0, 48, False)
    assert (wrong["pick_inside"], denied["pick_inside"]) == (0.0, None)
    assert (wrong["baseline_random"], wrong["baseline_attribute"]) == (0.25, 0.5)
    assert (denied["union"], denied["has_target"], denied["answered"]) == (0, False, False)
    assert (denied["pick_correct"], denied["baseline_random"], denied["baseline_attribute"]) == (None, None, None)


def test_tags_and_the_targets_share_of_the_image_are_kept(batch, answers):
    tags = [[{"clutter": "few", "group": "food"}, {}, {"clutter": "few"}] for _ in batch["image_id"]]
    plain = score_image(batch, 0, answers[0], "generative", 1)
    first, second, third = score_image({**batch, "tags": tags}, 0, answers[0], "generative", 1)
    assert first == plain[0] | {"tags": {"clutter": "few", "group": "food"}, "area_share": 0.25}
    assert second == plain[1]
    assert third == plain[2] | {"tags": {"clutter": "few"}, "area_share": 0.0}


def test_superpixels_at_another_resolution_are_scored_at_the_images(batch, answers):
    coarse = answers[0][1].region_map.resized((2, 2))
    given = [replace(one, region_map=coarse) for one in answers[0]]
    assert score_image(batch, 0, given, "generative", 2.5) == score_image(batch, 0, answers[0], "generative", 2.5)


def test_without_superpixels_or_objects_the_fields_are_none(batch, answers):
    bare = {key: value for key, value in batch.items() if key not in ("instances", "candidates", "split")}
    record = score_image(bare, 0, [replace(one, pick=None, region_map=None) for one in answers[0]], "generative", 1)[0]
    empty = ("pick_correct", "ceiling_single", "ceiling_union", "baseline_random", "baseline_attribute")
    assert [record[key] for key in empty] == [None] * len(empty)
    assert record["split"] == ""


def test_a_image_with_fewer_pixels_than_superpixels_has_no_ceiling(batch, answers):
    pixel = {**batch, "masks": [[np.ones((1, 1), np.uint8)]], "instances": [None], "text_input": [["dot"]]}
    (record,) = score_image(pixel, 0, [replace(answers[0][0], mask=np.ones((1, 1), np.uint8))], "generative", 1)
    assert (record["intersection"], record["pick_correct"], record["ceiling_single"]) == (1, None, None)


def test_the_caches_superpixels_give_the_ceiling_of_a_model_without(batch, answers):
    maps = [one[0].region_map for one in answers]
    given = [replace(one, pick=None, region_map=None) for one in answers[0]]
    record = score_image({**batch, "region_map": maps}, 0, given, "generative", 1)[0]
    assert (record["ceiling_single"], record["pick_correct"]) == (1.0, None)


def test_mask_of_another_size_names_the_expression_and_sizes(batch, answers):
    small = [replace(answers[0][0], mask=np.zeros((4, 6), np.uint8)), *answers[0][1:]]
    with pytest.raises(ValueError, match="Expression p0e0 of 0.png: The predicted mask is 4x6 but the true.* 8x12"):
        score_image(batch, 0, small, "generative", 1)


def test_mask_without_seg_is_refused(batch, answers):
    with pytest.raises(ValueError, match=r"p0e0 of 0.png: the model answered without \[SEG\], yet gave a mask of 24"):
        score_image(batch, 0, [replace(answers[0][0], answered=False)], "generative", 1)


def test_pick_that_is_no_region_is_refused(batch, answers):
    with pytest.raises(ValueError, match="p0e0 of 0.png: The picked region is 9"):
        score_image(batch, 0, [replace(answers[0][0], pick=9)], "generative", 1)


def test_score_of_a_diverged_model_is_none_and_strict_json(batch, answers):
    (record,) = score_image(batch, 0, [replace(answers[0][0], score=float("nan"))], "generative", 1)
    assert json.loads(record_line(record))["score"] is None


def test_flag_that_contradicts_the_mask_is_logged_and_the_mask_counts(batch, answers, caplog):
    batch["has_target"][0] = [False, True, False]
    record = score_image(batch, 0, answers[0], "generative", 1)[0]
    assert record["has_target"] is True
    assert "p0e0 of 0.png: its true mask has 24 pixels" in caplog.text


def test_predictions_must_pair_up_with_expressions(images, set_model, batch):
    model = set_model({"generative": images.answers()})
    predictions, ms = timed_predictions(model, batch, "generative")
    assert [len(one) for one in predictions] == [3, 3]
    assert ms > 0
    short = {**batch, "expression_ids": [["p0e0"], ["p1e0"]]}
    with pytest.raises(ValueError, match=r"have \[3, 3\] expressions, but the model answered \[1, 1\]"):
        timed_predictions(model, short, "generative")


def test_both_modes_in_one_record_keep_what_differs(batch, answers):
    main = score_image(batch, 0, answers[0], "generative", 1)[0]
    other = {**main, "mode": "teacher_forced", "intersection": 7}
    both = merge_modes(main, other)
    assert both["intersection"] == 24
    assert both["teacher_forced"]["intersection"] == 7
    assert set(both["teacher_forced"]) == set(ANSWER_FIELDS)


class EncodingModel(torch.nn.Module):
    """Encodes for 20 ms, answers each mode in 10 ms; keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def encode(self, samples):
        self.calls.append("encode")
        time.sleep(0.02)
        return "encoded"

    def predict_masks(self, samples, mode, encoded=None):
        encoded = self.encode(samples) if encoded is None else encoded
        self.calls.append(f"{mode} {encoded}")
        time.sleep(0.01)
        return [["a", "b"]]


def test_both_modes_share_one_encoding():
    model = EncodingModel()
    answers = predictions_by_mode(model, {"text_input": [["x", "y"]]}, ["generative", "teacher_forced"])
    assert model.calls == ["encode", "generative encoded", "teacher_forced encoded"]
    assert [(mode, rows) for mode, rows, _ in answers] == [
        ("generative", [["a", "b"]]),
        ("teacher_forced", [["a", "b"]]),
    ]
    assert all(15 <= ms < 60 for _, _, ms in answers)  # of two expressions: encoding counts in each mode


def test_a_model_that_takes_no_encoding_predicts_in_both_modes():
    class Plain(EncodingModel):
        def predict_masks(self, samples, mode):
            return super().predict_masks(samples, mode)

    model = Plain()
    predictions_by_mode(model, {"text_input": [["x", "y"]]}, ["generative", "teacher_forced"])
    assert model.calls.count("encode") == 2


def test_times_include_what_the_device_has_queued(monkeypatch):
    waits = []
    monkeypatch.setattr(scoring, "wait_for", lambda device: waits.append(str(device)))
    model = EncodingModel()
    model.weight = torch.nn.Parameter(torch.ones(1, device="meta"))
    predictions_by_mode(model, {"text_input": [["x", "y"]]}, ["generative"])
    assert waits == ["meta", "meta"]


def test_an_expression_without_an_answer_is_logged_and_counts_as_an_empty_mask(batch, answers, caplog):
    @dataclass
    class Failed(type(answers[0][0])):
        error: str = "Image 0 has NaN"

    given = answers[0][0]
    failed = Failed(mask=0 * given.mask, answered=False, text="", score=0.0)
    (record,) = score_image(batch, 0, [failed], "generative", 1)
    assert record["error"] == "Image 0 has NaN" and record["pred_area"] == record["intersection"] == 0
    assert "p0e0 of 0.png: it was not answered" in caplog.text
    assert "error" not in score_image(batch, 0, [given], "generative", 1)[0]


def test_letters_are_not_counted_as_expressions():
    class OneForAll(torch.nn.Module):
        def predict_masks(self, samples, mode):
            return [["an answer"] for _ in samples["text_input"]]

    ((_, rows, _),) = predictions_by_mode(OneForAll(), {"text_input": ["cup", "cat"]}, ["generative"])
    assert rows == [["an answer"]] * 2
