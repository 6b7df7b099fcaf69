"""Annotation readers: RefCOCO's two files, COCO with expressions, JSONL, questions and captions, SA-1B's masks."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import fake_refcoco
from tests.fuzz.damage import as_json, damaged_bytes, damaged_tree, deep_json, odd_values
from tests.fuzz.files import Files, listed, odd_places
from tests.fuzz.outcomes import Case, Target

INSTANCES, REFS, REFS_JSON = "refcoco/instances.json", "refcoco/refs(unc).p", "refcoco/refs(unc).json"
JSONL, COCO, TEXTS = "lines.jsonl", "coco.json", "texts.json"
QUESTIONS, ANSWERS, CAPTIONS = "questions.json", "answers.json", "captions.json"
SA1B = "sa_1.json"
IMAGE = "COCO_train2014"
FOLDER = "/annotations/"
"""Of everything here: what names the path of an image names the image."""
NAMES = ("instances.json", "refs(unc)", IMAGE, FOLDER)
PIXELS = (50, 40)  # (W, H) of the images of JSONL


def small_frame(image: np.ndarray) -> Any:
    """A vis_processor that costs nothing."""
    import torch

    return torch.zeros(1)


def read_samples(source: Any, images: Any) -> dict[str, Any]:
    """Every sample of every split, as an evaluation reads them; ``images`` is a folder, or what holds them."""
    import lavis_svp  # noqa: F401  (adapts LAVIS, so it goes first)
    from lavis_svp.datasets.referring import ReferringDataset
    from lavis_svp.datasets.sources import DataSource, ImageFolder

    data = DataSource(source, ImageFolder(images) if isinstance(images, Path) else images)
    content: dict[str, Any] = {}
    for split in source.splits():
        source.counts(split)
        dataset = ReferringDataset(data, [split], vis_processor=small_frame)
        for index in range(len(dataset)):
            content[f"{split} {index}"] = {k: v for k, v in dataset.sample(index).items() if k != "image"}
    return content


class Annotations:
    """Small annotation files of every kind in a folder, and their readers."""

    def __init__(self, folder: Path) -> None:
        fake_refcoco.make_tree(folder, references=12)
        for other in ("refcoco+", "refcocog"):
            for path in (folder / other).iterdir():
                path.unlink()
        self.images = folder / fake_refcoco.IMAGES
        with open(folder / REFS, "rb") as file:
            self.refs = pickle.load(file)  # made by the line above
        (folder / REFS_JSON).write_bytes(as_json(self.refs))
        self.instances = json.loads((folder / INSTANCES).read_text())
        used = {ref["image_id"] for ref in self.refs}
        self._write_own(folder)
        self._write_answering(folder, sorted(used)[:3])
        self._write_sa1b(folder)
        self.files = Files(folder)

    def _write_own(self, folder: Path) -> None:
        from PIL import Image

        rng = np.random.default_rng(0)
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (*PIXELS[::-1], 3), np.uint8)).save(folder / f"{number}.png")
        mask = np.zeros(PIXELS[::-1], np.uint8)
        mask[5:20, 5:20] = 255
        Image.fromarray(mask).save(folder / "mask.png")
        box = [[2, 2, 20, 2, 20, 18, 2, 18]]
        runs = {"size": list(PIXELS[::-1]), "counts": [100, 30, PIXELS[0] * PIXELS[1] - 130]}
        self.lines: list[dict[str, Any]] = [
            {"image": "0.png", "expressions": [{"text": "the cup", "segmentation": box}], "split": "train"},
            {
                "image": "1.png", "id": 7, "instances": [{"segmentation": runs, "category": "cup",
                "attributes": ["x"]}],
                "expressions": [{"text": "it", "targets": [0]}, {"text": "a cat", "targets": [], "kind": "absent"}],
            },
            {"image": "2.png", "expressions": [{"text": "the mask", "segmentation": "mask.png"}], "split": "val"},
        ]  # fmt: skip
        (folder / JSONL).write_bytes(self.jsonl(self.lines))
        content = copy.deepcopy(self.instances)
        for place, one in enumerate(content["annotations"][:8]):
            one["expressions"] = "the thing" if place % 2 else ["a thing", "another"]
        self.coco = content
        (folder / COCO).write_bytes(as_json(content))
        self.texts = {str(one["id"]): ["a thing"] for one in content["annotations"][:8]}
        (folder / TEXTS).write_bytes(as_json(self.texts))

    def _write_answering(self, folder: Path, images: list[int]) -> None:
        questions = [{"image_id": one, "question": "what is it?", "question_id": one * 10} for one in images]
        answers = [
            {
                "image_id": one, "question_id": one * 10, "question_type": "what is", "answer_type": "other",
                "multiple_choice_answer": "cup", "answers": [{"answer": "cup", "answer_confidence": "yes",
                "answer_id": 1}],
            }
            for one in images
        ]  # fmt: skip
        self.questions = {"data_subtype": "train2014", "questions": questions}
        self.answers = {"data_subtype": "train2014", "annotations": answers}
        names = {one["id"]: one for one in self.instances["images"]}
        self.captions = {
            "images": [names[one] for one in images],
            "annotations": [{"image_id": one, "id": one, "caption": "a cup"} for one in images],
        }
        for name, content in ((QUESTIONS, self.questions), (ANSWERS, self.answers), (CAPTIONS, self.captions)):
            (folder / name).write_bytes(as_json(content))

    def _write_sa1b(self, folder: Path) -> None:
        from lavis_svp.datasets.masks import encode_mask

        masks = np.random.default_rng(0).random((3, *PIXELS[::-1])) < 0.5
        rows = [{"id": number, "segmentation": encode_mask(mask), "area": 5} for number, mask in enumerate(masks)]
        self.sa1b = {"image": {"image_id": 1, "file_name": "sa_1.jpg"}, "annotations": rows}
        (folder / SA1B).write_bytes(as_json(self.sa1b))

    @staticmethod
    def jsonl(lines: list[Any]) -> bytes:
        return b"".join(as_json(line) + b"\n" for line in lines)

    def read_refcoco(self, refs: str = REFS) -> Any:
        from lavis_svp.datasets.refcoco import RefCOCO, split_images

        split_images(self.files.path(refs))
        return read_samples(RefCOCO(self.files.path(INSTANCES), self.files.path(refs)), self.images)

    def read_jsonl(self) -> Any:
        from lavis_svp.datasets.custom_formats import JsonlSource

        return read_samples(JsonlSource(self.files.path(JSONL)), self.files.folder)

    def read_coco(self) -> Any:
        from lavis_svp.datasets.custom_formats import CocoExpressions

        return read_samples(CocoExpressions(self.files.path(COCO)), self.images)

    def read_texts(self) -> Any:
        from lavis_svp.datasets.custom_formats import CocoExpressions

        return read_samples(CocoExpressions(self.files.path(INSTANCES), self.files.path(TEXTS)), self.images)

    def read_questions(self) -> Any:
        from lavis_svp.datasets.answering import read_vqa

        return read_vqa(self.files.path(QUESTIONS), self.files.path(ANSWERS), "val")

    def read_captions(self) -> Any:
        from lavis_svp.datasets.answering import read_captions

        return read_captions(self.files.path(CAPTIONS), "val")

    def read_sa1b(self) -> Any:
        from lavis_svp.datasets.sa1b import sa1b_labels

        return {
            "labels": sa1b_labels(self.files.path(SA1B).with_suffix(".jpg"), np.zeros((*PIXELS[::-1], 3), np.uint8))
        }


def build(folder: Path) -> list[Target]:
    """All targets of annotations."""
    import lavis_svp  # noqa: F401  (registers everything with LAVIS)

    known = Annotations(folder / FOLDER.strip("/"))
    targets = [*_bytes(known), *_fields(known), _nested(known), _ids(known), _masks(known), _places(known, folder)]
    return targets


def _bytes(known: Annotations) -> list[Target]:
    files = known.files
    rows: list[tuple[str, str, int, Callable[[], Any], tuple[str, ...]]] = [
        ("refs pickle: bytes", REFS, 400, known.read_refcoco, NAMES),
        ("instances: bytes", INSTANCES, 400, known.read_refcoco, NAMES),
        ("COCO with expressions: bytes", COCO, 250, known.read_coco, (COCO, IMAGE, FOLDER)),
        ("file of expressions: bytes", TEXTS, 150, known.read_texts, (TEXTS, "instances.json", IMAGE, FOLDER)),
        ("JSONL: bytes", JSONL, 400, known.read_jsonl, (JSONL, FOLDER, ".png")),
        ("questions: bytes", QUESTIONS, 150, known.read_questions, (QUESTIONS, ANSWERS)),
        ("captions: bytes", CAPTIONS, 150, known.read_captions, (CAPTIONS,)),
        ("SA-1B's masks: bytes", SA1B, 150, known.read_sa1b, (SA1B,)),
    ]
    return [
        Target(name, count, files.damaged(file, read, damaged_bytes, names), intact=_intact(files, read))
        for name, file, count, read, names in rows
    ]


def _intact(files: Files, read: Callable[[], Any]) -> Callable[[], Any]:
    def place_and_read() -> Any:
        files.place({})
        return read()

    return place_and_read


def _fields(known: Annotations) -> list[Target]:
    files = known.files

    def pickled(tree: Any) -> bytes:
        return pickle.dumps(tree, 2)

    def odd_for_pickle() -> list[Any]:
        return [*odd_values(), b"bytes", b"\xff\xfe", (1, 2), {1, 2}, frozenset()]

    def target(
        name: str, count: int, file: str, tree: Any, write: Callable[[Any], bytes], read: Callable[[], Any],
        names: tuple[str, ...], odd: Callable[[], list[Any]] = odd_values, **also: Any,
    ) -> Target:  # fmt: skip
        def case(rng: random.Random, number: int) -> Case:
            changed, label = damaged_tree(tree, rng, odd)
            return files.case(label, {**also.get("changes", {}), file: write(changed)}, read, names)

        return Target(name, count, case, intact=_intact(files, read))

    read_json_refs = functools.partial(known.read_refcoco, REFS_JSON)
    return [
        target("refs pickle: fields", 500, REFS, known.refs, pickled, known.read_refcoco, NAMES, odd_for_pickle),
        target("refs JSON: fields", 300, REFS_JSON, known.refs, as_json, read_json_refs, NAMES),
        target("instances: fields", 1000, INSTANCES, known.instances, as_json, known.read_refcoco, NAMES),
        target("COCO with expressions: fields", 600, COCO, known.coco, as_json, known.read_coco, (COCO, IMAGE, FOLDER)),
        target(
            "file of expressions: fields", 200, TEXTS, known.texts, as_json, known.read_texts,
            (TEXTS, "instances.json", IMAGE, FOLDER),
        ),
        target("JSONL: fields", 600, JSONL, known.lines, _lines_of, known.read_jsonl, (JSONL, FOLDER, ".png")),
        target(
            "questions: fields", 250, QUESTIONS, known.questions, as_json, known.read_questions, (QUESTIONS, ANSWERS)
        ),
        target("answers: fields", 250, ANSWERS, known.answers, as_json, known.read_questions, (QUESTIONS, ANSWERS)),
        target("captions: fields", 250, CAPTIONS, known.captions, as_json, known.read_captions, (CAPTIONS,)),
        target("SA-1B's masks: fields", 250, SA1B, known.sa1b, as_json, known.read_sa1b, (SA1B,)),
    ]  # fmt: skip


def _lines_of(tree: Any) -> bytes:
    return Annotations.jsonl(tree if isinstance(tree, list) else [tree])


def _nested(known: Annotations) -> Target:
    readers = {
        INSTANCES: known.read_refcoco, REFS_JSON: functools.partial(known.read_refcoco, REFS_JSON),
        COCO: known.read_coco, TEXTS: known.read_texts, JSONL: known.read_jsonl, QUESTIONS: known.read_questions,
        ANSWERS: known.read_questions, CAPTIONS: known.read_captions, SA1B: known.read_sa1b,
    }  # fmt: skip
    cases = [
        known.files.case(f"{file}: {label}", {file: content}, read, (Path(file).name,))
        for file, read in readers.items()
        for label, content in deep_json()
    ]
    return listed("annotations: nested and other JSON", cases)


# ------------------------------------------------------------------------------------- ids, sizes, empty masks


def _ids(known: Annotations) -> Target:
    """Annotations that are wrong, by the two ways of reading ``instances.json``."""
    cases = []
    target_id = known.refs[0]["ann_id"]
    image_id = known.refs[0]["image_id"]

    def change(make: Callable[[dict[str, Any]], None], base: Any) -> bytes:
        content = copy.deepcopy(base)
        make(content)
        return as_json(content)

    def annotation(content: Any) -> Any:
        return next(one for one in content["annotations"] if one["id"] == target_id)

    def image(content: Any) -> Any:
        return next(one for one in content["images"] if one["id"] == image_id)

    def double(kind: str, **values: Any) -> Callable[[Any], None]:
        def make(content: Any) -> None:
            one = annotation(content) if kind == "annotations" else image(content)
            content[kind].append({**copy.deepcopy(one), **values})

        return make

    def set_annotation(**values: Any) -> Callable[[Any], None]:
        return lambda content: annotation(content).update(values)

    def set_image(**values: Any) -> Callable[[Any], None]:
        return lambda content: image(content).update(values)

    def drop_segmentation(content: Any) -> None:
        del annotation(content)["segmentation"]

    size = image(known.instances)
    empty_runs = {"size": [size["height"], size["width"]], "counts": [size["height"] * size["width"]]}
    box = [[1, 1, 9, 1, 9, 9]]
    wrong: dict[str, Callable[[Any], None]] = {
        "the id of an annotation doubled": double("annotations", segmentation=box),
        "the id of an annotation doubled as a fraction": double("annotations", id=target_id + 0.5),
        "the id of an image doubled": double("images", height=7),
        "the id of an image doubled as a fraction": double("images", id=image_id + 0.9, height=7),
        "an annotation's id -1": double("annotations", id=-1),
        "an annotation's id -5": double("annotations", id=-5),
        "an annotation's id true": double("annotations", id=True),
        "an annotation's id null": double("annotations", id=None),
        "an annotation's id a text": double("annotations", id="abc"),
        "an image's id -1": double("images", id=-1),
        "an image's id NaN": double("images", id=float("nan")),
        "an annotation of an unknown image": double("annotations", id=10**9, image_id=10**9),
        "an unknown category": set_annotation(category_id=12345),
        "a category id that is a text": set_annotation(category_id="1"),
        "a size of zero": set_image(height=0, width=0),
        "a height of zero": set_image(height=0),
        "a negative width": set_image(width=-5),
        "a height of NaN": set_image(height=float("nan")),
        "a height of a fraction": set_image(height=10.5),
        "a target without a segmentation": drop_segmentation,
        "a target with an empty segmentation": set_annotation(segmentation=[]),
        "a target with null": set_annotation(segmentation=None),
        "a target with a polygon of two points": set_annotation(segmentation=[[1, 1, 5, 5]]),
        "a target wholly outside": set_annotation(segmentation=[[-90, -90, -50, -90, -50, -50]]),
        "a target far outside": set_annotation(segmentation=[[5000, 5000, 5010, 5000, 5010, 5010]]),
        "a target of no pixel": set_annotation(segmentation=empty_runs),
        "run lengths of another size": set_annotation(segmentation={"size": [5, 5], "counts": [25]}),
        "a target of another image": set_annotation(image_id=next(
            one["id"] for one in known.instances["images"] if one["id"] != image_id)),
    }  # fmt: skip
    for label, make in wrong.items():
        for file, base, read, names in (
            (INSTANCES, known.instances, known.read_refcoco, NAMES),
            (COCO, known.coco, known.read_coco, (COCO, IMAGE, FOLDER)),
        ):
            # another image of the same size takes the mask of this one, where nothing contradicts it
            must = not (label == "a target of another image" and file == COCO)
            must = must and label != "an annotation of an unknown image"  # nothing refers to it
            content = change(make, base)
            cases.append(known.files.case(f"{label} ({file})", {file: content}, read, names, must_refuse=must))

    def refs(label: str, must: bool = True, **values: Any) -> Case:
        content = copy.deepcopy(known.refs)
        content[0].update(values)
        change = {REFS: pickle.dumps(content, 2)}
        return known.files.case(f"{label} (refs)", change, known.read_refcoco, NAMES, must_refuse=must)

    cases += [
        refs("an unknown annotation", ann_id=10**9),
        refs("an annotation's id a fraction", ann_id=target_id + 0.5),
        refs("an annotation's id a text", ann_id="x"),
        refs("an unknown image", image_id=10**9),
        refs("an image's id a fraction", image_id=image_id + 0.5),
        refs("an image's id -1", image_id=-1),
        refs("sentences that are a text", sentences="the cup"),
        refs("an empty sentence", sentences=[{"sent": " ", "raw": "", "sent_id": 1}]),
        refs("no sentences", must=False, sentences=[]),
        refs("a split that is null", split=None),
        refs("a split that is a list", split=[]),
        refs("a ref id that is NaN", ref_id=float("nan")),
    ]
    for label, line in {
        "an id doubled": {**known.lines[0], "id": 7},
        "an id -1": {**known.lines[0], "id": -1},
        "an id of a fraction": {**known.lines[0], "id": 1.5},
        "an id true": {**known.lines[0], "id": True},
        "a target -1": {**known.lines[1], "id": 9, "expressions": [{"text": "it", "targets": [-1]}]},
        "a target too large": {**known.lines[1], "id": 9, "expressions": [{"text": "it", "targets": [1]}]},
        "an empty segmentation": {**known.lines[0], "expressions": [{"text": "it", "segmentation": []}]},
        "a polygon outside": {
            **known.lines[0], "expressions": [{"text": "it", "segmentation": [[-9, -9, -5, -9, -5, -5]]}]},
        "a polygon of two points": {**known.lines[0], "expressions": [{"text": "it", "segmentation": [[1, 1, 5, 5]]}]},
        "an empty text": {**known.lines[0], "expressions": [{"text": "  ", "segmentation": "mask.png"}]},
    }.items():  # fmt: skip
        content = known.jsonl([*known.lines, line])
        cases.append(
            known.files.case(
                f"{label} (JSONL)", {JSONL: content}, known.read_jsonl, (JSONL, FOLDER, ".png"), must_refuse=True
            )
        )
    return listed("ids, sizes and empty masks", cases)


def _masks(known: Annotations) -> Target:
    """Odd segmentations: coordinates that are huge or no numbers, codes that overflow."""
    width, height = PIXELS
    far = [
        [[1, 1, 9, 1, 9, value]]
        for value in (
            1e3,
            1e4,
            1e5,
            1e6,
            1e7,
            1e9,
            2**31,
            2**31 - 1,
            2**32,
            1e18,
            1e30,
            1e154,
            1e308,
            -1e3,
            -1e9,
            -1e308,
        )
    ]
    odd: list[Any] = [
        *far, *([[one[0][4], one[0][5], 5, 5, 1, 9]] for one in far),
        *([[1, 1, 9, 1, 9, value]] for value in (float("nan"), float("inf"), -float("inf"), None, "9", [], True)),
        [[1e9] * 6], [[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9]], [[1, 1, 2]], [[1]], [1, 2, 3, 4, 5, 6], [[[1, 1], [2, 2]]],
        [[0.1 * i for i in range(100_000)]], [[1, 1, 9, 1, 9, 9]] * 5000, "x", "../mask.png", 5, True, {}, {"size": 1},
        {"size": [height, width]}, {"counts": []}, {"size": [height, width], "counts": []},
        {"size": [height, width], "counts": [height * width + 1]}, {"size": [height, width], "counts": [-1] * 9},
        {"size": [height, width], "counts": [2**63, 2**63]}, {"size": [height, width], "counts": [2**70]},
        {"size": [height, width], "counts": [1.5, height * width - 1.5]}, {"size": [height, width], "counts": "a"},
        {"size": [height, width], "counts": "o" * 100_000}, {"size": [height, width], "counts": "\ud800"},
        {"size": [height, width], "counts": "0" * 10}, {"size": [height, width], "counts": {}},
        {"size": [height, width], "counts": [[height * width]]}, {"size": [height, width], "counts": None},
        {"size": [2**31, 2**31], "counts": [2**62]}, {"size": [-1, -1], "counts": [1]},
        {"size": [1e308, 1], "counts": [1]}, {"size": "ab", "counts": [1]}, {"size": [0, 0], "counts": []},
        {"size": [width, height], "counts": [height * width]}, [{"size": [height, width], "counts": "x"}],
        [None], [[None] * 6], [{}], [[]], [[[]]],
    ]  # fmt: skip
    cases = []
    for number, one in enumerate(odd):
        label = f"{str(one)[:50]} ({number})"
        line = {**known.lines[0], "expressions": [{"text": "it", "segmentation": one}]}
        cases.append(
            known.files.case(f"JSONL: {label}", {JSONL: known.jsonl([line])}, known.read_jsonl, (JSONL, FOLDER, ".png"))
        )
        content = copy.deepcopy(known.instances)
        next(a for a in content["annotations"] if a["id"] == known.refs[0]["ann_id"])["segmentation"] = one
        change = {INSTANCES: as_json(content)}
        cases.append(known.files.case(f"instances: {label}", change, known.read_refcoco, NAMES))
    return listed("masks: odd coordinates and codes", cases)


def _places(known: Annotations, folder: Path) -> Target:
    """File names that lead elsewhere, and files that are none."""
    outside = folder / "outside.png"
    outside.write_bytes(known.files.intact["0.png"])
    names = [
        "../outside.png", str(outside), "/etc/hostname", "/dev/zero", "a/../../outside.png", "a\0b", "", " ", ".", "..",
        "x" * 5000, "\ud800", "a\nb", "~/x", "file:///etc/hostname", "http://127.0.0.1/x.png", "0.png/x", 5, None, [],
    ]  # fmt: skip
    refused = (str(outside), "/etc/hostname", "/dev/zero", "../outside.png", "a/../../outside.png")
    cases = []
    first_image = known.instances["images"][0]["file_name"]
    for name in names:
        must = name in refused
        line = {**known.lines[0], "image": name}
        mask = {**known.lines[0], "expressions": [{"text": "it", "segmentation": name}]}
        content = copy.deepcopy(known.instances)
        content["images"][0]["file_name"] = name
        for label, change, read, where in (
            ("JSONL image", {JSONL: known.jsonl([line])}, known.read_jsonl, (JSONL, FOLDER, ".png")),
            ("JSONL mask", {JSONL: known.jsonl([mask])}, known.read_jsonl, (JSONL, FOLDER, ".png")),
            ("instances", {INSTANCES: as_json(content)}, known.read_refcoco, NAMES),
        ):
            cases.append(known.files.case(f"{label}: {name!r:.60}", change, read, where, must_refuse=must))
    image_path = f"{fake_refcoco.IMAGES}/{first_image}"
    for what, place in odd_places(outside).items():
        cases += [
            known.files.case(f"an image that is {what} (JSONL)", {"0.png": place}, known.read_jsonl, ("0.png",)),
            known.files.case(f"a mask that is {what}", {"mask.png": place}, known.read_jsonl, ("mask.png",)),
            known.files.case(f"an image that is {what}", {image_path: place}, known.read_refcoco, (first_image,)),
            known.files.case(f"instances.json that is {what}", {INSTANCES: place}, known.read_refcoco, NAMES),
            known.files.case(f"references that are {what}", {REFS: place}, known.read_refcoco, NAMES),
            known.files.case(f"JSONL that is {what}", {JSONL: place}, known.read_jsonl, (JSONL,)),
            known.files.case(f"questions that are {what}", {QUESTIONS: place}, known.read_questions, (QUESTIONS,)),
            known.files.case(f"captions that are {what}", {CAPTIONS: place}, known.read_captions, (CAPTIONS,)),
        ]
    return listed("file names, links, FIFOs, devices", cases, seconds=15)
