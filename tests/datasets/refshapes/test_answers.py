"""Questions and captions on disk: the official formats, made once."""

from __future__ import annotations

import json

import pytest

from lavis_svp.datasets.refshapes import build_refshapes
from lavis_svp.datasets.refshapes.answers import annotations_path, build_answers, captions_path, questions_path
from lavis_svp.datasets.refshapes.facts import read_facts
from lavis_svp.datasets.text_sources import read_captions, read_vqa


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    build_refshapes(folder, {"train": 3, "test": 2}, progress=False)
    build_answers(folder)
    return folder


def test_facts_are_the_scenes(root):
    from lavis_svp.datasets.refshapes.config import RefShapesConfig
    from lavis_svp.datasets.refshapes.image import make_image

    for facts, (split, index) in zip(
        read_facts(root), [("train", 0), ("train", 1), ("train", 2), ("test", 0), ("test", 1)], strict=True
    ):
        scene = make_image(0, split, index, RefShapesConfig()).scene
        assert facts.split == split and facts.file_name == f"{split}_{index:06d}.png"
        for shown, item, box, area in zip(facts.objects, scene.objects, scene.boxes, scene.areas, strict=True):
            assert (shown.size, shown.texture, shown.color, shown.shape) == (
                item.size,
                item.texture,
                item.color,
                item.shape,
            )
            assert (shown.x, shown.y, shown.area) == ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, area)


def test_vqav2s_keys(root):
    questions = json.loads(questions_path(root, "train").read_text())
    annotations = json.loads(annotations_path(root, "train").read_text())
    assert {"info", "task_type", "data_type", "data_subtype", "questions"} <= set(questions)
    assert questions["task_type"] == "Open-Ended"
    assert {"info", "data_type", "data_subtype", "annotations"} <= set(annotations)
    ids = [one["question_id"] for one in questions["questions"]]
    assert len(set(ids)) == len(ids) and ids == [one["question_id"] for one in annotations["annotations"]]
    for one in annotations["annotations"]:
        assert len(one["answers"]) == 10 and {answer["answer_id"] for answer in one["answers"]} == set(range(1, 11))
        assert {answer["answer"] for answer in one["answers"]} == {one["multiple_choice_answer"]}
        assert one["answer_type"] in ("yes/no", "number", "other")


def test_the_official_reader_takes_the_questions(root, tmp_path):
    import lavis_svp  # noqa: F401  (adapts LAVIS, so it goes before it)

    from lavis.common.vqa_tools.vqa import VQA  # isort: skip

    files = str(annotations_path(root, "train")), str(questions_path(root, "train"))
    vqa = VQA(*files)
    results = [{"question_id": number, "answer": "2"} for number in vqa.getQuesIds()]
    (tmp_path / "result.json").write_text(json.dumps(results))
    assert len(vqa.loadRes(str(tmp_path / "result.json"), files[1]).qa) == len(results) > 20


def test_cocos_caption_file_loads_with_cocos_own_reader(root):
    from pycocotools.coco import COCO

    coco = COCO(str(captions_path(root, "train")))
    assert len(coco.getImgIds()) == 3 and all(len(coco.imgToAnns[one]) == 5 for one in coco.getImgIds())


def test_the_readers_take_them(root):
    images = read_vqa(questions_path(root, "test"), annotations_path(root, "test"), "test")
    assert [one.file_name for one in images] == ["test_000000.png", "test_000001.png"]
    assert images[0].size == (336, 336)
    assert all(len(one.answers) == 10 for image in images for one in image.expressions)
    (caption,) = read_captions(captions_path(root, "test"), "test")[0].expressions
    assert caption.text == "" and len(caption.answers) == 5


def test_made_once_and_anew_for_another_seed_or_other_images(root, tmp_path):
    path = questions_path(root, "train")
    before = path.stat().st_mtime_ns
    build_answers(root)
    assert path.stat().st_mtime_ns == before
    build_refshapes(tmp_path, {"train": 3}, progress=False)
    build_answers(tmp_path, seed=0)
    first = questions_path(tmp_path, "train").read_text()
    assert first == path.read_text()  # other splits change nothing
    build_answers(tmp_path, seed=1)
    assert questions_path(tmp_path, "train").read_text() != first
    build_refshapes(tmp_path, {"train": 2}, progress=False)
    build_answers(tmp_path, seed=0)
    assert len(read_vqa(questions_path(tmp_path, "train"), annotations_path(tmp_path, "train"), "train")) == 2


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 or more"):
        build_answers(tmp_path, -1)
