"""Questions about a RefShapes image whose answers are known, and balanced so that guessing does not pay.

Kinds: ``count`` (0 to 4), ``color``, ``position`` (left/right, above/below, top/bottom), ``existence`` and ``relation``
(yes/no). Within each kind and form of question (the attributes it names) the answers come equally often, as far as the
images allow: of the answers that an image can give, the one that was given least so far is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lavis_svp.datasets.refshapes.config import ATTRIBUTES, COLORS, RefShapesConfig
from lavis_svp.datasets.refshapes.descriptions import Description
from lavis_svp.datasets.refshapes.facts import Facts, Shown, forms

QUESTION_KINDS = ("count", "color", "position", "existence", "relation")
ANSWER_TYPES = {"count": "number", "color": "other", "position": "other", "existence": "yes/no", "relation": "yes/no"}
"""VQAv2's ``answer_type`` of each kind."""

MOST_COUNTED = 4
ANSWERS = (*map(str, range(MOST_COUNTED + 1)), *COLORS, "left", "right", "above", "below", "top", "bottom", "yes", "no")
"""Every answer that a question can have."""

QUESTIONS_OF_A_KIND = 2
"""In each image, if it can give so many."""

_T = TypeVar("_T")
_STREAM = 2  # of the random numbers; 0 and 1 draw the images
_CANDIDATES = 12  # of each answer, which is plenty to draw from

_MARGIN = RefShapesConfig().relation_margin
SIDES = {("left", "right"): "x", ("above", "below"): "y"}
"""Opposite answers, and the coordinate that grows from the first to the second."""


@dataclass(frozen=True)
class Question:
    """A question with its only answer.

    Args:
        text: in English.
        kind: one of ``QUESTION_KINDS``.
        form: what is named in it, by which the answers are balanced.
        answer: in a word.
    """

    text: str
    kind: str
    form: str
    answer: str


class QuestionWriter:
    """Asks about images one after another; keeps count of the answers it has asked for.

    The questions of an image depend on the seed, on it, and on the images of its split before it.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._given: Counter[tuple[str, str, str, str]] = Counter()

    def ask(self, facts: Facts) -> list[Question]:
        """The questions about an image, kind by kind; fewer where it has nothing to ask about."""
        rng = np.random.default_rng([self.seed, facts.image_id, _STREAM])
        asked: list[Question] = []
        for kind in QUESTION_KINDS:
            proposals, names = _KINDS[kind]
            order = [names[int(i)] for i in rng.permutation(len(names))]
            texts: set[str] = set()
            for form in order:
                if len(texts) == QUESTIONS_OF_A_KIND:
                    break
                question = self._rarest(facts, kind, form, list(proposals(facts, form, rng)))
                if question is not None and question.text not in texts:
                    texts.add(question.text)
                    asked.append(question)
        return asked

    def _rarest(self, facts: Facts, kind: str, form: tuple[str, ...], offered: list[Question]) -> Question | None:
        """One with the answer that this form of question had least, and of those, that its kind had least."""
        if not offered:
            return None
        name = "+".join(form)

        def given(question: Question) -> tuple[int, int]:
            keys = [(facts.split, kind, name, question.answer), (facts.split, kind, "", question.answer)]
            return self._given[keys[0]], self._given[keys[1]]

        chosen = min(offered, key=given)
        for group in (name, ""):
            self._given[facts.split, kind, group, chosen.answer] += 1
        return chosen


def phrase(description: Description, plural: bool = False) -> str:
    """A description in words, without an article: "small striped red circles"."""
    values = dict(description)
    noun = values.pop("shape", "object")
    ending = ("es" if noun.endswith("s") else "s") if plural else ""
    return " ".join([*values.values(), noun + ending])


def _count(facts: Facts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[Question]:
    """How many fit a description; none at all for words that the image has, but not together."""
    by_answer: dict[int, list[Description]] = {}
    for description in [*facts.descriptions(form), *_absent(facts, form, rng)]:
        by_answer.setdefault(len(facts.fitting(description)), []).append(description)
    for number in sorted(by_answer):
        if number <= MOST_COUNTED:
            text = f"how many {phrase(_one(rng, by_answer[number]), plural=True)} are there?"
            yield Question(text, "count", "+".join(form), str(number))


def _color(facts: Facts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[Question]:
    """The colour of the only object that fits."""
    unique = [description for description in facts.descriptions(form) if len(facts.fitting(description)) == 1]
    for description in _shuffled(rng, unique):
        item = facts.objects[facts.fitting(description)[0]]
        yield Question(f"what color is the {phrase(description)}?", "color", "+".join(form), item.color)


def _position(facts: Facts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[Question]:
    """The side on which an object lies, of another object or of the image's middle."""
    where, *names = form
    for first, second, item, other in _pairs(facts, tuple(names), rng):
        for sides, axis in SIDES.items():
            if where == "object":
                answer = _side(item, other, sides, axis)
                text = f"is the {first} {_of(sides[0])} or {_of(sides[1])} the {second}?"
            else:
                middle = facts.size[1] / 2 if axis == "x" else facts.size[0] / 2
                edges = sides if axis == "x" else ("top", "bottom")
                answer = _side(item, middle, edges, axis)
                text = f"is the {first} in the {edges[0]} or the {edges[1]} half of the picture?"
            if answer is not None:
                yield Question(text, "position", "+".join(form), answer)


def _existence(facts: Facts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[Question]:
    """Whether anything fits; if not, then one word alone is wrong."""
    for answer, descriptions in (("yes", facts.descriptions(form)), ("no", _absent(facts, form, rng))):
        if descriptions:
            words = phrase(_one(rng, descriptions))
            article = "an" if words[0] in "aeiou" else "a"
            yield Question(f"is there {article} {words}?", "existence", "+".join(form), answer)


def _relation(facts: Facts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[Question]:
    """Whether one object lies on the named side of another."""
    for first, second, item, other in _pairs(facts, form, rng):
        for sides, axis in SIDES.items():
            truth = _side(item, other, sides, axis)
            if truth is not None:
                named = sides[int(rng.integers(2))]
                answer = "yes" if named == truth else "no"
                yield Question(f"is the {first} {_of(named)} the {second}?", "relation", "+".join(form), answer)


_Propose = Callable[[Facts, tuple[str, ...], np.random.Generator], Iterable[Question]]
_ALL = forms()
_NAMING = [names for names in _ALL if "shape" in names or "color" in names]
_KINDS: dict[str, tuple[_Propose, list[tuple[str, ...]]]] = {
    "count": (_count, _ALL),
    "color": (_color, forms(tuple(name for name in ATTRIBUTES if name != "color"))),
    "position": (_position, [(where, *names) for where in ("object", "picture") for names in _NAMING]),
    "existence": (_existence, _ALL),
    "relation": (_relation, _NAMING),
}


def _absent(facts: Facts, form: tuple[str, ...], rng: np.random.Generator) -> list[Description]:
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


def _pairs(facts: Facts, form: tuple[str, ...], rng: np.random.Generator) -> Iterator[tuple[str, str, Shown, Shown]]:
    """Two objects that their descriptions tell apart from all others, in random order."""
    unique = [description for description in facts.descriptions(form) if len(facts.fitting(description)) == 1]
    pairs = [(one, other) for one in unique for other in unique if one != other]
    for one, other in _shuffled(rng, pairs)[:_CANDIDATES]:
        item, rival = facts.objects[facts.fitting(one)[0]], facts.objects[facts.fitting(other)[0]]
        yield phrase(one), phrase(other), item, rival


def _side(item: Shown, other: Shown | float, sides: tuple[str, str], axis: str) -> str | None:
    """Which of two opposite sides an object is on; None where that is not plain."""
    reference = getattr(other, axis) if isinstance(other, Shown) else other
    offset = getattr(item, axis) - reference
    return None if abs(offset) < _MARGIN else sides[int(offset > 0)]


def _of(side: str) -> str:
    return f"{side} of" if side in ("left", "right") else side


def _one(rng: np.random.Generator, items: list[Description]) -> Description:
    return items[int(rng.integers(len(items)))]


def _shuffled(rng: np.random.Generator, items: list[_T]) -> list[_T]:
    return [items[int(i)] for i in rng.permutation(len(items))]
