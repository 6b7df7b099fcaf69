"""Data sets of questions and captions: what a sample and a batch hold; the builders and their YAML files."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_svp.common.files import BadFileError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.answering import AnsweringDataset, TextSource, read_captions, read_vqa
from lavis_svp.datasets.layout import MissingDataError
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.sources import ANY_SIZE, DataSource, Expression, ImageFolder, ReferredImage

BUILDERS = ("vqa_files", "caption_files", "refshapes_vqa", "refshapes_caption")
TYPES = [(name, kind) for name in BUILDERS for kind in registry.get_builder_class(name).DATASET_CONFIG_DICT]


class Vision:
    hflip_prob = 0.0
    takes_rng = False

    def __call__(self, pixels):
        return torch.zeros(4, 8, 8)


def dataset(folder, train, expressions, split="train", hflip=0.0, **sampling):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (6, 4), "red" if name[0] == "a" else "blue").save(folder / name)
    images = [
        ReferredImage(1, "a.png", ANY_SIZE, split, tuple(expressions)),
        ReferredImage(2, "b.png", ANY_SIZE, split, (Expression("20", "", "caption", (), answers=("one", "two")),)),
    ]
    vision = Vision()
    vision.hflip_prob = hflip
    return AnsweringDataset(
        DataSource(TextSource({split: images}), ImageFolder(folder)),
        (split,),
        train,
        vis_processor=vision,
        text_processor=str.upper,
        options=SamplingOptions(**sampling),
    )


ASKED = (
    Expression("10", "how many?", "count", (), answers=("2",) * 7 + ("3",) * 3),
    Expression("11", "which side?", "position", (), answers=("left",)),
)


def test_training_draws_an_answer_each_epoch_by_how_many_gave_it(tmp_path):
    data = dataset(tmp_path, True, ASKED)
    drawn = Counter()
    for epoch in range(120):
        data.set_epoch(epoch)
        sample = data[0]
        said = dict(zip(sample["text_input"], sample["text_output"], strict=True))
        drawn[said["HOW MANY?"]] += 1
        assert said["WHICH SIDE?"] == "left" and sample["masks"] == [None, None] and sample["has_target"] == [False] * 2
        assert data[0]["text_output"] == sample["text_output"]  # the same draw again
    assert set(drawn) == {"2", "3"} and 1.3 < drawn["2"] / drawn["3"] < 5
    assert data[1]["text_input"] == [""] and {data[1]["text_output"][0]} <= {"one", "two"}


def test_mirrored_images_have_mirrored_answers(tmp_path):
    data = dataset(tmp_path, True, ASKED, hflip=1.0, expressions_per_image=2)
    sample = data[0]
    said = dict(zip(sample["expression_ids"], sample["text_output"], strict=True))
    assert sample["image_key"].endswith("-mirrored") and said["11"] == "right" and said["10"] in "23"
    compass = (Expression("10", "which way?", "x", (), answers=("east",)),)
    assert not dataset(tmp_path, True, compass, hflip=1.0)[0]["image_key"].endswith("-mirrored")


def test_evaluation_has_every_question_once_with_its_id(tmp_path):
    data = dataset(tmp_path, False, ASKED, "test")
    batch = data.collater([data[0], data[1]])
    assert batch["question_id"] == [[10, 11], [20]] and batch["text_input"] == [["HOW MANY?", "WHICH SIDE?"], [""]]
    assert data.expression_ids() == ["10", "11", "20"]


def test_one_question_an_item_is_laviss_own_form(tmp_path):
    data = dataset(tmp_path, False, ASKED, "test", max_expressions=1)
    batch = data.collater([data[index] for index in range(3)])
    assert batch["text_input"] == ["HOW MANY?", "WHICH SIDE?", ""]
    assert torch.equal(batch["question_id"], torch.tensor([10, 11, 20])) and batch["image"].shape == (3, 4, 8, 8)


# ------------------------------------------------------------------------------------------------- builders


def section(name, kind="default", **changes):
    config = OmegaConf.load(registry.get_builder_class(name).default_config_path(kind)).datasets[name]
    return OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes.items()]))


@pytest.mark.parametrize(("name", "kind"), TYPES)
def test_yaml_files(name, kind):
    content = OmegaConf.load(registry.get_builder_class(name).default_config_path(kind))
    assert list(content) == ["datasets"] and list(content.datasets) == [name]
    registry.get_builder_class(name)(content.datasets[name])
    assert "storage" in content.datasets[name].build_info.images


@pytest.mark.parametrize("name", BUILDERS)
def test_default_yaml_shows_every_key(name):
    shown = OmegaConf.to_container(section(name))
    options = registry.get_builder_class(name).options_cls()
    assert not set(vars(options)) - set(shown) - {"type", "dataset_card"}
    assert set(shown["sampling"]) == set(vars(SamplingOptions()))
    assert set(shown["build_info"]) == set(vars(options.build_info))


@pytest.mark.parametrize("key", ["build_info.rot", "build_info.annotations.tst", "sampling.per_image"])
def test_an_unknown_key_is_named(key, tmp_path):
    with pytest.raises(ValueError, match=key.rpartition(".")[2]):
        builder = registry.get_builder_class("refshapes_vqa")(section("refshapes_vqa", **{key: "x"}))
        builder.files()


def test_refshapes_shares_images_with_the_expressions(tmp_path):
    found = {}
    for name in ("refshapes_seg", "refshapes_vqa", "refshapes_caption"):
        changes = {"build_info.root": tmp_path, "build_info.sizes.train": 2, "build_info.sizes.test": 1}
        info = section(name, **changes)
        for mode in ("train", "eval"):
            info.vis_processor[mode].image_size = 32
        info.build_info.annotations.val = None
        found[name] = registry.get_builder_class(name)(info).build_datasets()
    for split in ("train", "test"):
        keys = {
            name: [
                (sample["image_id"], sample["image_key"]) for sample in map(one[split].sample, range(len(one[split])))
            ]
            for name, one in found.items()
        }
        assert keys["refshapes_seg"] and keys["refshapes_seg"] == keys["refshapes_vqa"] == keys["refshapes_caption"]
    sample = found["refshapes_vqa"]["train"][0]
    assert sample["instances"]["labels"].shape == sample["original_size"]
    assert set(sample) == set(found["refshapes_seg"]["train"][0])
    asked = found["refshapes_vqa"]["test"]
    assert set(asked[0]["text_output"]) <= set(asked.answer_list)
    assert all(path.is_file() for path in asked.ground_truth) and asked.coco_fmt_qust_file == str(asked.ground_truth[0])


@pytest.fixture
def files(tmp_path):
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / "COCO_val2014_000000000042.jpg")
    questions = [{"image_id": 42, "question": "How many?", "question_id": 1}]
    answers = [{"answer": "2", "answer_id": 1}] * 10
    content = {
        "questions.json": {"data_subtype": "val2014", "questions": questions},
        "annotations.json": {"annotations": [{"question_id": 1, "question_type": "how many", "answers": answers}]},
        "captions.json": {
            "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}],
            "annotations": [{"id": 1, "image_id": 42, "caption": "Nothing."}],
        },
        "list.json": ["1", "2"],
    }
    for name, one in content.items():
        (tmp_path / name).write_text(json.dumps(one))
    return tmp_path


def test_vqav2s_and_cocos_own_files(files):
    info = {"build_info.images.storage": files, "build_info.answer_list": files / "list.json"}
    vqa = {f"build_info.annotations.test.{key}": files / f"{key}.json" for key in ("questions", "annotations")}
    data = registry.get_builder_class("vqa_files")(section("vqa_files", **info, **vqa)).build_datasets()["test"]
    assert data[0]["text_input"] == ["How many?"] and data[0]["text_output"] == ["2"] and data.answer_list == ["1", "2"]
    captions = {f"build_info.annotations.{split}.captions": files / "captions.json" for split in ("train", "val")}
    found = registry.get_builder_class("caption_files")(section("caption_files", **info, **captions)).build_datasets()
    assert set(found) == {"train", "val"} and found["train"][0]["text_output"] == ["Nothing."]


def test_images_in_cocos_folders_are_found(files):
    name = "COCO_val2014_000000000042.jpg"
    (files / "coco/val2014").mkdir(parents=True)
    (files / name).rename(files / "coco/val2014" / name)
    changes = {"build_info.images.storage": files / "coco"}
    changes["build_info.annotations.val.captions"] = files / "captions.json"
    data = registry.get_builder_class("caption_files")(section("caption_files", **changes)).build_datasets()["val"]
    assert data[0]["file_name"] == name and data[0]["original_size"] == (5, 7)


def test_what_is_missing_is_named(files):
    cls = registry.get_builder_class("vqa_files")
    given = {"build_info.annotations.train.questions": files / "questions.json"}
    with pytest.raises(ValueError, match="training needs the answers"):
        cls(section("vqa_files", **given)).build_datasets()
    test = {"build_info.annotations.test.questions": files / "questions.json"}
    with pytest.raises(MissingDataError, match=r"images\.storage"):
        cls(section("vqa_files", **test)).build_datasets()
    with pytest.raises(MissingDataError, match="000000000042"):
        cls(section("vqa_files", **test, **{"build_info.images.storage": files / "x"})).build_datasets()
    with pytest.raises(MissingDataError, match=r"none\.json"):
        cls(section("vqa_files", **{"build_info.annotations.test.questions": files / "none.json"})).build_datasets()
    with pytest.raises(ValueError, match="not enough"):
        cls(section("vqa_files", **{"build_info.annotations.test.annotations": "x"})).build_datasets()


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
        (lambda q, a: q["questions"].append(q["questions"][0] | {"question": "?"}), "have the question_id 420"),
        (lambda q, a: a["annotations"].append(a["annotations"][0] | {"answers": []}), "have the question_id 420"),
        (lambda q, a: q["questions"].append(5), "entry 3 of 'questions' must be a JSON object"),
        (lambda q, a: q["questions"][0].update(question=[1]), "question 420: 'question' must be a text"),
        (lambda q, a: q["questions"][0].update(image="other.jpg"), "question 42[01] has image 42 as .*other"),
        (lambda q, a: q["questions"][0].update(height=0, width=0), "question 420 is 0x0"),
        (lambda q, a: q["questions"][0].update(question_id=float("inf")), "question_id is inf"),
        (lambda q, a: q.update(data_subtype=[]), "'data_subtype' must be a text"),
        (lambda q, a: a["annotations"][0].update(answers=5), "question 420: 'answers' must be a list"),
        (lambda q, a: a["annotations"][0].update(answers=[5]), "question 420 must be a JSON object"),
        (lambda q, a: a["annotations"][0].update(answers=[{"answer": 2}]), "question 420: 'answer' must be a text"),
    ],
)
def test_a_damaged_file_is_told(write, change, message):
    questions, annotations = json.loads(json.dumps(QUESTIONS)), json.loads(json.dumps(ANNOTATIONS))
    change(questions, annotations)
    with pytest.raises(BadFileError, match=message):
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
        ({"images": [5], "annotations": []}, "entry 0 of 'images' must be a JSON object"),
        ({"images": [], "annotations": [5]}, "annotation 0 must be a JSON object"),
        ({"images": [{"id": 5}], "annotations": [{"image_id": 5, "caption": "x"}]}, "image 5: 'file_name' must be"),
        ({"images": [{"id": 5, "file_name": "a"}, {"id": 5, "file_name": "b"}], "annotations": []}, "have the id 5"),
    ],
)
def test_damaged_captions_are_told(write, content, message):
    with pytest.raises(BadFileError, match=message):
        read_captions(write("c.json", content), "train")


def test_texts_have_no_masks(write):
    (image, _) = read_vqa(write("q.json", QUESTIONS), None, "test")
    source = TextSource({"test": [image]})
    assert source.splits() == ["test"] and source.counts("test").sentences == 1 and source.instances(image) == []
    with pytest.raises(ValueError, match="answered in words"):
        source.target_mask(image, image.expressions[0])
    with pytest.raises(UnknownNameError, match="Known: test"):
        source.images("val")
