"""VQAv2's and COCO's files: what is read, and what a damaged one is told."""

from __future__ import annotations

import json

import pytest

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.refcoco import ANY_SIZE
from lavis_svp.datasets.text_sources import TextSource, read_captions, read_vqa

QUESTIONS = {
    "task_type": "Open-Ended",
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "How many dogs?", "question_id": 420},
        {"image_id": 9, "question": "Is it day?", "question_id": 90},
        {"image_id": 42, "question": "What color?", "question_id": 421},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": number,
            "image_id": image,
            "question_type": kind,
            "answer_type": "other",
            "multiple_choice_answer": answer,
            "answers": [{"answer_id": i, "answer": answer, "answer_confidence": "yes"} for i in range(10)],
        }
        for number, image, kind, answer in (
            (420, 42, "how many", "2"),
            (421, 42, "what", "red"),
            (90, 9, "is it", "yes"),
        )
    ]
}


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return written


def test_vqav2_by_image(write):
    images = read_vqa(write("q.json", QUESTIONS), write("a.json", ANNOTATIONS), "val")
    assert [(one.image_id, one.file_name, one.split) for one in images] == [
        (9, "COCO_val2014_000000000009.jpg", "val"),
        (42, "COCO_val2014_000000000042.jpg", "val"),
    ]
    assert images[1].size == ANY_SIZE
    first, second = images[1].expressions
    assert (first.expression_id, first.text, first.kind, first.answers) == (
        "420",
        "How many dogs?",
        "how many",
        ("2",) * 10,
    )
    assert second.answers == ("red",) * 10


def test_questions_without_answers_have_none(write):
    images = read_vqa(write("q.json", QUESTIONS), None, "test")
    assert all(one.answers == () for image in images for one in image.expressions)


def test_captions_by_image(write):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 6}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": " A cat. "}, {"id": 2, "image_id": 1, "caption": "Cats"}],
    }
    (image,) = read_captions(write("c.json", content), "train")
    assert (image.size, image.expressions[0].answers) == ((4, 6), ("A cat.", "Cats"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: q.pop("questions"), "lacks the list questions"),
        (lambda q, a: a.pop("annotations"), "lacks the list annotations"),
        (lambda q, a: a["annotations"].pop(), "question 90 has no answers"),
        (lambda q, a: a["annotations"][0].update(answers=[]), "question 420 has no answers"),
        (lambda q, a: q["questions"][0].update(question=" "), "question 420 is empty"),
        (lambda q, a: q["questions"][0].update(image_id="x"), "image_id is 'x'"),
        (lambda q, a: q["questions"][0].update(image="../x.jpg"), "leads out"),
        (lambda q, a: q.pop("data_subtype"), "neither data_subtype"),
    ],
)
def test_a_damaged_file_is_told(write, change, message):
    questions, annotations = json.loads(json.dumps(QUESTIONS)), json.loads(json.dumps(ANNOTATIONS))
    change(questions, annotations)
    with pytest.raises(ValueError, match=message):
        read_vqa(write("q.json", questions), write("a.json", annotations), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "lacks the list annotations"),
        ({"images": [], "annotations": [{"id": 1, "image_id": 5, "caption": "x"}]}, r"images \[5\]"),
        (
            {"images": [{"id": 5, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 5}]},
            "annotation 1 has no caption",
        ),
    ],
)
def test_damaged_captions_are_told(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_captions(write("c.json", content), "train")


def test_texts_have_no_masks(write):
    (image, _) = read_vqa(write("q.json", QUESTIONS), None, "test")
    source = TextSource({"test": [image]})
    assert source.splits() == ["test"] and source.counts("test").sentences == 1 and source.instances(9) == []
    with pytest.raises(ValueError, match="answered in words"):
        source.target_mask(image, image.expressions[0])
    with pytest.raises(UnknownNameError, match="Known: test"):
        source.images("val")
