"""What comes to the model's door: a broken image or text spoils its own answer alone, a batch that is none is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lavis_svp.models.outputs import NoAnswer

MODES = ("generative", "teacher_forced")
IMAGE_KEYS = ("image", "original_size", "file_name")
LONG = "the red cup " * 200


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(seg_prompt={"pointer": True, "pointer_position": True}).eval()


@pytest.fixture
def batch(batch):
    return {**batch, "file_name": ["a.jpg", "b.jpg"]}


def broken(batch, value, channel=0):
    image = batch["image"].clone()
    image[0, channel, 5, 7] = value
    return {**batch, "image": image}


def same(found, expected):
    assert (found.answered, found.text, found.error) == (expected.answered, expected.text, None)
    assert (found.mask == expected.mask).all() and found.score == pytest.approx(expected.score)
    torch.testing.assert_close(found.low_logits, expected.low_logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("value", "channel"), [(math.nan, 1), (-math.inf, 0), (math.nan, 3)])
def test_a_broken_image_has_no_answer_and_the_others_have_theirs(model, batch, mode, value, channel):
    before = model.predict_masks(batch, mode)
    bad = broken(batch, value, channel)
    given = bad["image"].clone()
    found = model.predict_masks(bad, mode)
    same(found[1][0], before[1][0])
    for one in found[0]:
        assert "Image 0 of the batch (a.jpg) has NaN or infinite pixels" in one.error
        assert one.mask.shape == (96, 128) and not one.mask.any() and not one.answered
        assert (one.text, one.score, one.pick) == ("", 0.0, None) and np.isfinite(one.logits).all()
    assert torch.equal(bad["image"].nan_to_num(9), given.nan_to_num(9))  # the caller's tensor stays


def test_training_names_a_broken_image(model, batch):
    with pytest.raises(ValueError, match=r"Image 0 of the batch \(a.jpg\) has NaN"):
        model(broken(batch, math.nan))


def test_broken_cached_features_are_no_answer_either(model, batch):
    with torch.no_grad():
        vision = model.extractor(batch)
    frozen = [
        {"patches": patches, "valid": valid, "sam": sam}
        for patches, valid, sam in zip(vision.patches.patches, vision.patches.valid, vision.sam, strict=True)
    ]
    cached = {key: value for key, value in batch.items() if key != "image"}
    cached |= {"frozen": frozen, "region_map": vision.region_maps}
    before = model.predict_masks(cached)
    frozen[0] = {**frozen[0], "sam": frozen[0]["sam"].clone().fill_(math.inf)}
    found = model.predict_masks(cached)
    same(found[1][0], before[1][0])
    assert all("a.jpg) has NaN or infinite cached features" in one.error for one in found[0])


def test_scores_that_are_not_finite_are_no_answer(model, batch, monkeypatch):
    decode = type(model.mask_decoder).forward

    def first_overflows(self, *args):
        logits = decode(self, *args)
        return torch.cat([logits[:1] * math.inf, logits[1:]])

    before = model.predict_masks(batch, "teacher_forced")
    monkeypatch.setattr(type(model.mask_decoder), "forward", first_overflows)
    found = model.predict_masks(batch, "teacher_forced")
    assert "scores for image 0" in found[0][0].error and not found[0][0].mask.any()
    same(found[0][1], before[0][1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("text", "message"),
    [(LONG, "max_turn_tokens"), ("", "empty"), (" \n", "empty"), ("\ud800", "empty")],
    ids=["long", "empty", "spaces", "half a character"],
)
def test_a_broken_text_has_no_answer_and_the_others_have_theirs(model, batch, mode, text, message):
    before = model.predict_masks(batch, mode)
    found = model.predict_masks(
        {**batch, "text_input": [["the red cup", text, batch["text_input"][0][2]], ["the circle"]]}, mode
    )
    assert message in found[0][1].error and "\n" not in found[0][1].error and not found[0][1].mask.any()
    for image, number in ((0, 0), (0, 2), (1, 0)):
        same(found[image][number], before[image][number])


def test_half_a_character_is_left_out_of_a_text(model, batch):
    asked = {**batch, "text_input": ["the \udfff cup", "a"]}
    plain = {**batch, "text_input": ["the   cup", "a"]}
    same(model.predict_masks(asked)[0][0], model.predict_masks(plain)[0][0])


def test_a_text_without_room_behind_the_visual_tokens_fails_alone(make_model, batch):
    model = make_model(language={"max_length": 64}).eval()
    batch["text_input"] = [["the red cup " * 20], ["the circle"]]
    (long,), (short,) = model.predict_masks(batch, "teacher_forced")
    assert "max_length" in long.error and short.error is None


def test_answers_in_words_fail_one_by_one(model, batch):
    images = {key: broken(batch, math.nan)[key] for key in IMAGE_KEYS}
    good = {key: batch[key] for key in IMAGE_KEYS}
    expected = model.predict_answers({**good, "text_input": ["what?", "who?"]})
    for extra in ({}, {"inference_method": "rank", "answer_list": ["a cat", "a dog"]}):
        answers = model.predict_answers({**images, "text_input": ["what?", "who?"]}, **extra)
        assert answers[0] == "" and "NaN" in answers[0].error and not isinstance(answers[1], NoAnswer)
    assert model.predict_answers({**images, "text_input": ["what?", "who?"]})[1] == expected[1]
    assert model.predict_answers({**good, "text_input": [LONG, "who?"]}) == ["", expected[1]]
    assert isinstance(model.generate({**good, "prompt": ["", "who?"]})[0], NoAnswer)


def test_one_text_is_put_to_every_image(model, batch):
    alone = model.predict_masks({**batch, "text_input": "the circle"})
    each = model.predict_masks({**batch, "text_input": ["the circle", "the circle"]})
    assert [len(row) for row in alone] == [1, 1]
    for found, expected in zip(alone, each, strict=True):
        same(found[0], expected[0])


def test_a_text_and_a_list_in_one_batch_lose_no_answer(model, batch):
    images = {key: batch[key] for key in IMAGE_KEYS}
    assert [len(row) for row in model.predict_answers({**images, "text_input": ["what?", ["who?", "where?"]]})] == [
        1,
        2,
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floats_are_images_too(model, batch, dtype):
    image = batch["image"].to(dtype)
    found = model.predict_masks({**batch, "image": image})
    expected = model.predict_masks({**batch, "image": image.float()})
    same(found[1][0], expected[1][0])


SIZES = [(96, 128), (128, 128)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"image": b["image"] * 255}, "must lie in 0..1, image 0"),
        (lambda b: {"image": b["image"] - 0.5}, "must lie in 0..1"),
        (lambda b: {"image": b["image"].long()}, "torch.int64"),
        (lambda b: {"image": b["image"].bool()}, "torch.bool"),
        (lambda b: {"image": b["image"].numpy()}, "got ndarray"),
        (lambda b: {"image": list(b["image"])}, "got list"),
        (lambda b: {"image": b["image"].to_sparse()}, "torch.sparse_coo"),
        (lambda b: {"image": b["image"].to("meta")}, "on meta"),
        (lambda b: {"image": b["image"][:0], "original_size": [], "text_input": []}, "no images"),
        (lambda b: {"image": b["image"] * torch.tensor([1, 1, 1, 0.5])[:, None, None]}, "fourth channel"),
        (lambda b: {"image": b["image"].flip(2)}, "fourth channel"),
        (lambda b: {"original_size": [*SIZES, (5, 5)]}, "2 images, but 3"),
        (lambda b: {"original_size": SIZES[:1]}, "2 images, but 1"),
        (lambda b: {"original_size": [(0, 0), (128, 128)]}, r"original_size\[0\] is \(0, 0\)"),
        (lambda b: {"original_size": [(128, 128), (-3, 5)]}, r"original_size\[1\]"),
        (lambda b: {"original_size": [(96.5, 128), (128, 128)]}, r"original_size\[0\]"),
        (lambda b: {"original_size": [(10**9, 10**9), (128, 128)]}, "at most"),
        (lambda b: {"original_size": [96, 128]}, r"original_size must hold \(H, W\)"),
        (lambda b: {"original_size": ["ab", None]}, r"original_size must hold \(H, W\)"),
        (lambda b: {"original_size": torch.tensor([[math.nan, 1], [1, 1]])}, r"original_size must hold \(H, W\)"),
        (lambda b: {"text_input": ["a"]}, "2 images but 1 texts"),
        (lambda b: {"text_input": ["a", "b", "c"]}, "2 images but 3 texts"),
        (lambda b: {"text_input": None}, "text_input must be a list"),
        (lambda b: {"text_input": {"a": 1}}, "text_input must be a list"),
        (lambda b: {"text_input": [b"a", "b"]}, r"text_input\[0\]"),
        (lambda b: {"text_input": ["a", ["b", None]]}, r"text_input\[1\]"),
        (lambda b: {"text_input": [5, "b"]}, r"text_input\[0\]"),
        (lambda b: {"text_input": [[], ["b"]]}, "0 expressions"),
        (lambda b: {"region_map": ["x"]}, "entries in region_map"),
        (lambda b: {"frozen": [None] * 3}, "entries in frozen"),
    ],
)
def test_a_batch_that_is_none_is_told_in_one_line(model, batch, change, message):
    with pytest.raises(ValueError, match=message) as told:
        model.predict_masks({**batch, **change(batch)})
    assert "\n" not in str(told.value)


def test_a_batch_without_texts_is_told(model, batch):
    with pytest.raises(ValueError, match="no text_input"):
        model.predict_masks({key: batch[key] for key in IMAGE_KEYS})


def test_lean_images_must_have_a_size_each(model, batch):
    lean = {**batch, "image": (batch["image"][:, :3] * 255).to(torch.uint8)}
    for sizes in (SIZES[:1], [*SIZES, (5, 5)]):
        with pytest.raises(ValueError, match=f"2 images, but {len(sizes)}"):
            model.predict_masks({**lean, "original_size": sizes})


MASK = np.ones((96, 128), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_input": "cup"}, "text_input must be a list"),
        ({"text_input": [["a"], ["b"], ["c"]], "masks": [[MASK]] * 3, "has_target": None}, "2 images, but 3"),
        ({"masks": [[255 * MASK] * 3, [MASK]]}, "spans 255 to 255"),
        ({"masks": [[math.nan * MASK] * 3, [MASK]]}, "spans nan"),
        ({"masks": [["x", "y", "z"], [MASK]]}, r"A mask is \(H, W\)"),
        ({"masks": [None, [MASK]]}, "masks must hold a list"),
        ({"has_target": [True, True]}, "has_target must hold a list"),
        ({"text_output": ["x", "y", "z"]}, "2 images, but text_output has 3"),
        ({"text_output": "x"}, "is one text"),
        ({"text_output": [5, ["x"]]}, r"text_output\[0\]"),
    ],
)
def test_what_training_cannot_learn_from_is_told(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model({**batch, **change})
