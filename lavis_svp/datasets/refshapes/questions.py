"""Questions and captions about RefShapes' images, from the annotations on disk, in VQAv2's and COCO's formats.

Kinds of questions: ``count`` (0 to 4), ``color``, ``position`` (left/right, above/below, top/bottom), ``existence`` and
``relation`` (yes/no). So that guessing does not pay, within each kind and form of question (the attributes that it
names) the answers come equally often, as far as the images allow: of the possible answers of an image, the rarest one
so far is chosen. The order of the random draws is part of the data: changing it changes the questions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lavis_svp.common.options import SetupError
from lavis_svp.datasets.refcoco import load_instances
from lavis_svp.datasets.refcoco_writer import instances_path, own_manifest, write_json
from lavis_svp.datasets.refshapes.build import NAME, split_of
from lavis_svp.datasets.refshapes.config import ATTRIBUTES, COLORS, SPLITS, RefShapesConfig
from lavis_svp.datasets.refshapes.expressions import Description

QUESTION_KINDS = ("count", "color", "position", "existence", "relation")
ANSWER_TYPES = {"count": "number", "color": "other", "position": "other", "existence": "yes/no", "relation": "yes/no"}
"""VQAv2's ``answer_type`` of each kind."""

MOST_COUNTED = 4
ANSWERS = (*map(str, range(MOST_COUNTED + 1)), *COLORS, "left", "right", "above", "below", "top", "bottom", "yes", "no")
"""Every answer that a question can have."""

QUESTIONS_OF_A_KIND = 2
"""In each image, if it has so many."""

_T = TypeVar("_T")
_STREAM = 2  # of the random numbers; 0 and 1 draw the images
_CANDIDATES = 12  # of each answer, which is plenty to draw from
_MARGIN = RefShapesConfig().relation_margin
SIDES = {("left", "right"): "x", ("above", "below"): "y"}
"""Opposite answers, and the coordinate that grows from the first to the second."""


@dataclass(frozen=True)
class ShownObject:
    """One object.

    Args:
        size, texture, color, shape: words of ``config.ATTRIBUTES``.
        x, y: centre of the visible part's box, pixels from the left and from the top.
        area: of the visible part, pixels.
    """

    size: str
    texture: str
    color: str
    shape: str
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class ImageFacts:
    """One image.

    Args:
        image_id: in ``instances.json``.
        file_name: of the image.
        split: "train", "val" or "test".
        size: (H, W) in pixels.
        objects: all of them.
    """

    image_id: int
    file_name: str
    split: str
    size: tuple[int, int]
    objects: tuple[ShownObject, ...]

    def fitting(self, description: Description) -> list[ShownObject]:
        """The objects that a description fits."""
        return [one for one in self.objects if all(getattr(one, name) == value for name, value in description)]

    def descriptions(self, names: tuple[str, ...]) -> list[Description]:
        """Each description by these attributes that fits something, in a fixed order."""
        return sorted({tuple((name, getattr(item, name)) for name in names) for item in self.objects})

    def unique(self, names: tuple[str, ...]) -> list[tuple[Description, ShownObject]]:
        """Each description by these attributes that fits a single object, and that object."""
        found = [(description, self.fitting(description)) for description in self.descriptions(names)]
        return [(description, objects[0]) for description, objects in found if len(objects) == 1]


def read_facts(root: Path) -> list[ImageFacts]:
    """All images of RefShapes below a data folder, by ascending id.

    Raises:
        FileNotFoundError: RefShapes has not been made there.
    """
    content = load_instances(instances_path(root, NAME))
    shapes = {category["id"]: category["name"] for category in content["categories"]}
    objects: dict[int, list[ShownObject]] = {}
    for one in sorted(content["annotations"], key=lambda one: one["id"]):
        color, texture, size = one["attributes"]
        left, top, width, height = one["bbox"]
        shown = ShownObject(
            size, texture, color, shapes[one["category_id"]], left + width / 2, top + height / 2, one["area"]
        )
        objects.setdefault(one["image_id"], []).append(shown)
    facts = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        size, image_id = (image["height"], image["width"]), image["id"]
        own = tuple(objects.get(image_id, ()))
        facts.append(ImageFacts(image_id, image["file_name"], split_of(image_id), size, own))
    return facts


@dataclass(frozen=True)
class Question:
    """A question with its only answer.

    Args:
        text: in English.
        kind: one of ``QUESTION_KINDS``.
        form: the attributes that it names, by which the answers are balanced.
        answer: in a word.
    """

    text: str
    kind: str
    form: str
    answer: str


class QuestionWriter:
    """Writes questions about images one after another, counting the answers of each form.

    The questions of an image depend on the seed, on it, and on the images of its split before it.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._used: Counter[tuple[str, str, str, str]] = Counter()

    def ask(self, facts: ImageFacts) -> list[Question]:
        """The questions about an image, kind by kind; fewer where it has too few objects."""
        rng = np.random.default_rng([self.seed, facts.image_id, _STREAM])
        questions: list[Question] = []
        for kind, (propose, forms) in _KINDS.items():
            texts: set[str] = set()
            for form in _shuffled(rng, forms):
                if len(texts) == QUESTIONS_OF_A_KIND:
                    break
                question = self._rarest(facts.split, kind, "+".join(form), list(propose(facts, form, rng)))
                if question is not None and question.text not in texts:
                    texts.add(question.text)
                    questions.append(question)
        return questions

    def _rarest(self, split: str, kind: str, form: str, proposals: list[tuple[str, str]]) -> Question | None:
        """The (text, answer) whose answer is rarest for its form, and among those, for its kind."""
        if not proposals:
            return None
        groups = (form, "")
        text, answer = min(proposals, key=lambda one: [self._used[split, kind, group, one[1]] for group in groups])
        self._used.update((split, kind, group, answer) for group in groups)
        return Question(text, kind, form, answer)


def phrase(description: Description) -> str:
    """A description in words, without an article: "small striped red circle"."""
    values = dict(description)
    noun = values.pop("shape", "object")
    return " ".join([*values.values(), noun])


# Each of these proposes questions of one kind with their answers, for one form (the attributes that they name).


def _count(facts: ImageFacts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """How many fit a description; none at all for words that the image has, but not together."""
    by_answer: dict[int, list[Description]] = {}
    for description in [*facts.descriptions(form), *_absent(facts, form)]:
        by_answer.setdefault(len(facts.fitting(description)), []).append(description)
    for number in sorted(by_answer):
        if number <= MOST_COUNTED:
            yield f"how many {_plural(phrase(_one(rng, by_answer[number])))} are there?", str(number)


def _color(facts: ImageFacts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """The colour of the only object that fits."""
    for description, item in _shuffled(rng, facts.unique(form)):
        yield f"what color is the {phrase(description)}?", item.color


def _position(facts: ImageFacts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """The side on which an object lies, of another object or of the image's middle."""
    where, *names = form
    for first, second, item, other in _pairs(facts, tuple(names), rng):
        for sides, axis in SIDES.items():
            if where == "object":
                answer = _side(item, getattr(other, axis), sides, axis)
                text = f"is the {first} {_of(sides[0])} or {_of(sides[1])} the {second}?"
            else:
                edges = sides if axis == "x" else ("top", "bottom")
                answer = _side(item, facts.size[int(axis == "x")] / 2, edges, axis)
                text = f"is the {first} in the {edges[0]} or the {edges[1]} half of the picture?"
            if answer is not None:
                yield text, answer


def _existence(facts: ImageFacts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Whether anything fits; if not, then one word alone is wrong."""
    for answer, descriptions in (("yes", facts.descriptions(form)), ("no", _absent(facts, form))):
        if descriptions:
            yield f"is there {_counted(phrase(_one(rng, descriptions)), 1)}?", answer


def _relation(facts: ImageFacts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Whether one object lies on the named side of another."""
    for first, second, item, other in _pairs(facts, form, rng):
        for sides, axis in SIDES.items():
            truth = _side(item, getattr(other, axis), sides, axis)
            if truth is not None:
                named = sides[int(rng.integers(2))]
                yield f"is the {first} {_of(named)} the {second}?", "yes" if named == truth else "no"


def _forms(*within: str) -> list[tuple[str, ...]]:
    """All choices of at least one attribute, in the order in which English puts them."""
    return [names for count in range(1, len(within) + 1) for names in combinations(within, count)]


_Propose = Callable[[ImageFacts, tuple[str, ...], np.random.Generator], Iterator[tuple[str, str]]]
_ALL = _forms(*ATTRIBUTES)
_NAMING = [names for names in _ALL if "shape" in names or "color" in names]
_KINDS: dict[str, tuple[_Propose, list[tuple[str, ...]]]] = {
    "count": (_count, _ALL),
    "color": (_color, _forms("size", "texture", "shape")),
    "position": (_position, [(where, *names) for where in ("object", "picture") for names in _NAMING]),
    "existence": (_existence, _ALL),
    "relation": (_relation, _NAMING),
}


def _absent(facts: ImageFacts, form: tuple[str, ...]) -> list[Description]:
    """Descriptions that fit nothing, each one word away from one that fits; first those whose words all occur."""
    found = facts.descriptions(form)
    present = {(name, getattr(item, name)) for item in facts.objects for name in form}
    absent = {
        (*description[:place], (name, value), *description[place + 1 :])
        for description in found
        for place, (name, _) in enumerate(description)
        for value in ATTRIBUTES[name]
    } - set(found)
    near = sorted(description for description in absent if set(description) <= present)
    return (near or sorted(absent))[:: max(1, len(absent) // _CANDIDATES)] if absent else []


def _pairs(
    facts: ImageFacts, form: tuple[str, ...], rng: np.random.Generator
) -> Iterator[tuple[str, str, ShownObject, ShownObject]]:
    """Two objects that their descriptions tell apart from all others, in random order."""
    unique = facts.unique(form)
    pairs = [(one, other) for one in unique for other in unique if one != other]
    for (first, item), (second, other) in _shuffled(rng, pairs)[:_CANDIDATES]:
        yield phrase(first), phrase(second), item, other


def _side(item: ShownObject, reference: float, sides: tuple[str, str], axis: str) -> str | None:
    """The side of ``reference`` on which an object is; None where that is not plain."""
    offset = getattr(item, axis) - reference
    return None if abs(offset) < _MARGIN else sides[int(offset > 0)]


def _of(side: str) -> str:
    return f"{side} of" if side in ("left", "right") else side


def _one(rng: np.random.Generator, items: list[Description]) -> Description:
    return items[int(rng.integers(len(items)))]


def _shuffled(rng: np.random.Generator, items: list[_T]) -> list[_T]:
    return [items[int(i)] for i in rng.permutation(len(items))]


CAPTIONS = 5
NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def captions(facts: ImageFacts) -> list[str]:
    """Five true captions: by place across and down, by size, by shape, and by the outermost objects."""
    across = sorted(facts.objects, key=lambda item: item.x)
    down = sorted(facts.objects, key=lambda item: item.y)
    names = Counter(f"{item.color} {item.shape}" for item in sorted(facts.objects, key=lambda item: -item.area))
    shapes = Counter(item.shape for item in across)
    between = "one object" if len(across) == 3 else f"{NUMBERS[len(across) - 2]} objects"
    return [
        f"from left to right, {_listed(map(_named, across))}",
        f"from top to bottom, {_listed(map(_named, down))}",
        f"a picture of {_listed(_counted(name, count) for name, count in names.items())}",
        f"{NUMBERS[len(across)]} objects: {_listed(_counted(shape, count) for shape, count in shapes.items())}",
        f"{_named(across[0])} on the left and {_named(across[-1])} on the right, with {between} between them",
    ]


def _named(item: ShownObject) -> str:
    return _counted(f"{item.color} {item.shape}", 1)


def _counted(words: str, count: int) -> str:
    if count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{NUMBERS[count]} {_plural(words)}"


def _plural(words: str) -> str:
    return words + ("es" if words.endswith("s") else "s")


def _listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


ANSWERS_VERSION = 1
"""Raised by hand whenever the same images would get other questions or captions; old files are then made anew."""

ANSWERS_OF_A_QUESTION = 10  # VQAv2 has ten people's answers; here all ten agree
_QUESTIONS_PER_IMAGE = 32


def questions_path(root: Path, split: str) -> Path:
    """Where the questions of a split are."""
    return root / NAME / "answers" / f"vqa_{split}_questions.json"


def annotations_path(root: Path, split: str) -> Path:
    """Where their answers are."""
    return root / NAME / "answers" / f"vqa_{split}_annotations.json"


def captions_path(root: Path, split: str) -> Path:
    """Where the captions of a split are."""
    return root / NAME / "answers" / f"captions_{split}.json"


def build_answers(root: Path, seed: int = 0) -> Path:
    """Write questions, answers and captions of every split, or return at once if they are there.

    Args:
        root: data folder, in which RefShapes has been made.
        seed: of the questions, 0 or more.

    Returns:
        the folder of the files.

    Raises:
        FileNotFoundError: RefShapes is not there.
        SetupError: a seed below 0.
        BadFileError: files are there that the manifest does not vouch for.
    """
    if seed < 0:
        raise SetupError(f"The seed of RefShapes' questions must be 0 or more, got {seed}.")
    digest = hashlib.sha256(instances_path(root, NAME).read_bytes()).hexdigest()
    made_from = {"version": ANSWERS_VERSION, "seed": seed, "instances": digest}
    folder = root / NAME / "answers"
    paths = [path(root, split) for split in SPLITS for path in (questions_path, annotations_path, captions_path)]
    manifest = folder / "manifest.json"
    if own_manifest(manifest, made_from, paths) == made_from and all(path.is_file() for path in paths):
        return folder
    write_json(manifest, {**made_from, "complete": False})
    facts = read_facts(root)
    for split in SPLITS:
        own = [one for one in facts if one.split == split]
        questions, annotations = _vqa_content(own, QuestionWriter(seed), split)
        write_json(questions_path(root, split), questions)
        write_json(annotations_path(root, split), annotations)
        write_json(captions_path(root, split), _caption_content(own))
    write_json(manifest, made_from)
    return folder


def _vqa_content(facts: list[ImageFacts], writer: QuestionWriter, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """VQAv2's two files: questions and annotations; a question also names its image's file and size."""
    questions, annotations = [], []
    for image in facts:
        shown = {"image": image.file_name, "height": image.size[0], "width": image.size[1]}
        for number, question in enumerate(writer.ask(image)):
            ids = {"image_id": image.image_id, "question_id": image.image_id * _QUESTIONS_PER_IMAGE + number}
            questions.append({**ids, "question": question.text, **shown})
            answer = {"answer": question.answer, "answer_confidence": "yes"}
            annotations.append(
                {
                    **ids,
                    "question_type": question.kind,
                    "answer_type": ANSWER_TYPES[question.kind],
                    "multiple_choice_answer": question.answer,
                    "answers": [{"answer_id": one, **answer} for one in range(1, ANSWERS_OF_A_QUESTION + 1)],
                }
            )
    shared = {
        "info": {"description": f"Questions about {NAME}, written by lavis_svp", "version": str(ANSWERS_VERSION)},
        "data_type": NAME,
        "data_subtype": split,
        "license": {"name": "as lavis_svp's", "url": ""},  # the official evaluation reads the key
    }
    return {**shared, "task_type": "Open-Ended", "questions": questions}, {**shared, "annotations": annotations}


def _caption_content(facts: list[ImageFacts]) -> dict[str, Any]:
    """COCO's captions file."""
    images = [
        {"id": one.image_id, "file_name": one.file_name, "height": one.size[0], "width": one.size[1]} for one in facts
    ]
    annotations = [
        {"id": one.image_id * CAPTIONS + number, "image_id": one.image_id, "caption": text}
        for one in facts
        for number, text in enumerate(captions(one))
    ]
    info = {"description": f"Captions of {NAME}, written by lavis_svp", "version": str(ANSWERS_VERSION)}
    return {"info": info, "images": images, "annotations": annotations}
