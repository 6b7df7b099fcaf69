"""Every generated answer and caption is true of its image, read again from the words by slow loops."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.files import BadFileError
from lavis_svp.datasets.answering import read_captions, read_vqa
from lavis_svp.datasets.refshapes import build_refshapes, questions
from lavis_svp.datasets.refshapes.config import COLORS, SHAPES, SIZES, TEXTURES
from lavis_svp.datasets.refshapes.questions import (
    ANSWERS,
    NUMBERS,
    QUESTION_KINDS,
    QUESTIONS_OF_A_KIND,
    ImageFacts,
    QuestionWriter,
    ShownObject,
    annotations_path,
    build_answers,
    captions,
    captions_path,
    questions_path,
    read_facts,
)

SIDE = 336


@st.composite
def images(draw, image_id=None):
    def item():
        return ShownObject(
            draw(st.sampled_from(SIZES)),
            draw(st.sampled_from(TEXTURES)),
            draw(st.sampled_from(sorted(COLORS))),
            draw(st.sampled_from(SHAPES)),
            draw(st.integers(20, SIDE - 20)) + 0.0,
            draw(st.integers(20, SIDE - 20)) + 0.0,
            draw(st.integers(1000, 9000)) + 0.0,
        )

    objects = tuple(item() for _ in range(draw(st.integers(3, 8))))
    number = draw(st.integers(1, 500)) if image_id is None else image_id
    return ImageFacts(number, f"train_{number:06d}.png", "train", (SIDE, SIDE), objects)


def fitting(facts, words):
    """Objects that all the words are true of: one word after the other, one object after the other."""
    found = []
    for index, item in enumerate(facts.objects):
        said = (item.size, item.texture, item.color, item.shape)
        for word in words.split():
            if word in ("object", "objects"):
                continue
            for plural in ("es", "s", ""):
                if plural and word.endswith(plural) and word[: -len(plural)] in SHAPES:
                    word = word[: -len(plural)]
                    break
            if word not in said:
                break
        else:
            found.append(index)
    return found


def only(facts, words):
    (index,) = fitting(facts, words)
    return facts.objects[index]


BEFORE = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


def holds(first, way, second):
    axis, sign = BEFORE[way]
    return sign * (getattr(first, axis) - getattr(second, axis)) > 0


def true_answer(facts, text):
    """The answer, by reading the English."""
    if found := re.fullmatch(r"how many (.+) are there\?", text):
        return str(len(fitting(facts, found[1])))
    if found := re.fullmatch(r"what color is the (.+)\?", text):
        return only(facts, found[1]).color
    if found := re.fullmatch(r"is there an? (.+)\?", text):
        return "yes" if fitting(facts, found[1]) else "no"
    if found := re.fullmatch(r"is the (.+) in the (\w+) or the (\w+) half of the picture\?", text):
        item = only(facts, found[1])
        place = item.x if {found[2], found[3]} == {"left", "right"} else item.y
        return found[2] if place < SIDE / 2 else found[3]
    if found := re.fullmatch(r"is the (.+?) (left of|above) or (right of|below) the (.+)\?", text):
        one, other = only(facts, found[1]), only(facts, found[4])
        return (found[2] if holds(one, found[2], other) else found[3]).split()[0]
    found = re.fullmatch(r"is the (.+?) (left of|right of|above|below) the (.+)\?", text)
    return "yes" if holds(only(facts, found[1]), found[2], only(facts, found[3])) else "no"


@settings(max_examples=60, deadline=None)
@given(images(), st.integers(0, 3))
def test_answers_are_true_and_known(facts, seed):
    asked = QuestionWriter(seed).ask(facts)
    for question in asked:
        assert question.answer == true_answer(facts, question.text), question
        assert question.answer in ANSWERS
    per_kind = Counter(question.kind for question in asked)
    assert set(per_kind) <= set(QUESTION_KINDS) and max(per_kind.values()) <= QUESTIONS_OF_A_KIND
    assert len({question.text for question in asked}) == len(asked)


@settings(max_examples=20, deadline=None)
@given(images())
def test_the_same_image_and_seed_ask_the_same(facts):
    assert QuestionWriter(1).ask(facts) == QuestionWriter(1).ask(facts)


@settings(max_examples=60, deadline=None)
@given(images())
def test_captions_are_true(facts):
    across, down, by_size, by_shape, outer = captions(facts)

    def names(text):
        return re.findall(rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", text)

    def sorted_names(key):
        return [(item.color, item.shape) for item in sorted(facts.objects, key=key)]

    assert across.startswith("from left to right, ") and names(across) == sorted_names(lambda item: item.x)
    assert down.startswith("from top to bottom, ") and names(down) == sorted_names(lambda item: item.y)
    said = Counter()
    for number, color, noun in re.findall(rf"({'|'.join(NUMBERS)}|an) ({'|'.join(COLORS)}) (\w+)", by_size):
        shape = next(shape for shape in SHAPES if noun in (shape, shape + "s", shape + "es"))
        said[color, shape] += 1 if number == "an" else NUMBERS.index(number)
    assert said == Counter((item.color, item.shape) for item in facts.objects)
    number, listed = re.fullmatch(r"(\w+) objects: (.+)", by_shape).groups()
    assert NUMBERS.index(number) == len(facts.objects)
    shapes = Counter()
    for one, noun in re.findall(r"(\w+) (\w+)", listed.replace(",", "").replace(" and ", " ")):
        shapes[next(shape for shape in SHAPES if noun in (shape, shape + "s", shape + "es"))] += NUMBERS.index(one)
    assert shapes == Counter(item.shape for item in facts.objects)
    order = sorted_names(lambda item: item.x)
    assert names(outer)[:2] == [order[0], order[-1]]


@pytest.fixture(scope="module")
def made():
    """Questions about 60 images of the real generator."""
    from lavis_svp.datasets.refshapes.build import make_image
    from lavis_svp.datasets.refshapes.config import RefShapesConfig

    config, writer, asked = RefShapesConfig(), QuestionWriter(0), []
    for index in range(60):
        scene = make_image(0, "test", index, config).scene
        places = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
        objects = tuple(
            ShownObject(item.size, item.texture, item.color, item.shape, float(x), float(y), float(area))
            for item, (x, y), area in zip(scene.objects, places, scene.areas, strict=True)
        )
        asked += writer.ask(ImageFacts(2_000_001 + index, "a.png", "test", (SIDE, SIDE), objects))
    return asked


def test_guessing_does_not_pay(made):
    """The commonest answer of a kind is hardly commoner than the others; that of a count is 0 or 1 for want of more."""
    most = {}
    for kind in QUESTION_KINDS:
        answers = Counter(question.answer for question in made if question.kind == kind)
        assert sum(answers.values()) > 110
        most[kind] = max(answers.values()) / sum(answers.values())
    assert most["existence"] < 0.54 and most["relation"] < 0.54
    assert most["color"] < 0.2 and most["position"] < 0.3 and most["count"] < 0.4


def test_no_form_of_question_gives_its_answer_away(made):
    """Within yes/no questions that name the same attributes, both answers come about equally often."""
    for kind in ("existence", "relation"):
        forms = Counter((question.form, question.answer) for question in made if question.kind == kind)
        for form in {form for form, _ in forms}:
            assert abs(forms[form, "yes"] - forms[form, "no"]) <= 4, form


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    build_refshapes(folder, {"train": 3, "test": 2}, progress=False)
    build_answers(folder)
    return folder


def test_facts_are_the_scenes(root):
    from lavis_svp.datasets.refshapes.build import make_image
    from lavis_svp.datasets.refshapes.config import RefShapesConfig

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


def test_files_of_unknown_origin_are_never_touched(tmp_path):
    build_refshapes(tmp_path, {"train": 1}, progress=False)
    path = captions_path(tmp_path, "test")
    path.parent.mkdir()
    path.write_text("somebody's own")
    with pytest.raises(BadFileError, match="does not say that lavis-svp made it"):
        build_answers(tmp_path)
    assert path.read_text() == "somebody's own" and list(path.parent.iterdir()) == [path]


def test_interrupted_work_goes_on(root, tmp_path, monkeypatch):
    shutil.copytree(root / "refshapes", tmp_path / "refshapes", ignore=shutil.ignore_patterns("answers"))
    with monkeypatch.context() as patch:
        patch.setattr(questions, "_caption_content", lambda facts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_answers(tmp_path)
    build_answers(tmp_path)
    for path in (root / "refshapes/answers").iterdir():
        assert (tmp_path / "refshapes/answers" / path.name).read_bytes() == path.read_bytes()


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 or more"):
        build_answers(tmp_path, -1)
