"""Further views of a marked photograph to train on: parts of it, some mirrored, with what is still true of them.

Marked photographs are few, and features are computed once for an image, so a training that only redraws them sees the
same superpixels again and again. A view is a photograph of its own: things are larger in it, some are gone, and what is
gone may be asked for as an absent thing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from dataclasses import dataclass

import cv2
import numpy as np

from lavis_svp.datasets.mirroring import can_mirror, mirror_text
from lavis_svp.datasets.refcoco_writer import NewExpression
from lavis_svp.datasets.refphotos.marks import NAME, NO_TARGET, Marks, size_word

VIEWS_VERSION = 2
"""Raised by hand whenever the same photographs would be cut otherwise."""
_SHARES = (0.45, 0.95)
"""A view's sides, as shares of the photograph's; drawn evenly."""
_VISIBLE = 0.5
"""At least this share of an object is in the view, or its expressions are left out."""
_GONE_PER_VIEW = 2
_LONGER_SIDE = 800
_TRIES = 20
_PLACE = re.compile(
    r"\b(left\w*|right\w*|top|bottom|upper|lower|middle|cent(er|re)|corner|edge|front|back\w*|behind|above|below|under"
    r"|next|near\w*|beside|between|close\w*|far\w*|first|second|third|last)\b"
)
"""Words of place: in a part of the photograph, what they say may hold of another thing, or of one."""


@dataclass(frozen=True)
class View:
    """A part of a photograph.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        marks: what is visible in it, and the expressions that hold of it.
    """

    pixels: np.ndarray
    marks: Marks


def make_views(name: str, pixels: np.ndarray, marks: Marks, count: int) -> list[View]:
    """Cut views out of a photograph; the same ones for the same photograph and count.

    A view keeps an expression whose object is at least half visible; one of place or relation only if all that it
    chooses from are. The name of a thing that is wholly gone becomes an expression that fits nothing (two a view at
    most). The nouns of a thing that is asked for by name are further names of it, where no other object has them.

    Args:
        name: of the photograph; seeds the draws.
        pixels: (H, W, 3) uint8 RGB, upright.
        marks: what was marked in it.
        count: how many; fewer come back where 20 parts in a row show nothing that is asked for.

    Returns:
        the views; every second one is mirrored, unless its expressions cannot be.

    Raises:
        ValueError: the photograph and its masks differ in size.
    """
    if pixels.shape[:2] != marks.masks.shape[1:]:
        raise ValueError(f"{name} has {pixels.shape[:2]} pixels (H, W), its masks {marks.masks.shape[1:]}.")
    rng = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    views: list[View] = []
    for number in range(count):
        for _ in range(_TRIES):
            top, left, height, width = _window(rng, marks.masks.shape[1:])
            cut = np.s_[top : top + height, left : left + width]
            kept = _kept_marks(marks, marks.masks[:, cut[0], cut[1]], rng)
            if kept is not None and any(one.target is not None for one in kept.expressions):
                views.append(_finished(pixels[cut], kept, mirrored=number % 2 == 1))
                break
    return views


def _window(rng: random.Random, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a part of an image of (H, W)."""
    height, width = (max(1, round(side * rng.uniform(*_SHARES))) for side in size)
    return rng.randint(0, size[0] - height), rng.randint(0, size[1] - width), height, width


def _kept_marks(marks: Marks, masks: np.ndarray, rng: random.Random) -> Marks | None:
    """What holds of a part of a photograph with these (K, h, w) masks; None if none of its objects is there."""
    visible = masks.sum(axis=(1, 2)) / marks.masks.sum(axis=(1, 2))
    there = [index for index, share in enumerate(visible) if share > 0]
    if not there:
        return None
    new_index = {old: new for new, old in enumerate(there)}
    expressions: dict[str, NewExpression] = {}
    gone: list[NewExpression] = []
    for one in marks.expressions:
        if one.kind == NO_TARGET:
            if not _PLACE.search(one.text):
                expressions[one.text] = one
        elif one.kind == NAME and not any(visible[index] > 0 for index in one.candidates):
            tags = tuple(tag for tag in one.tags if tag[0] == "clutter")
            gone.append(NewExpression(one.text, NO_TARGET, NO_TARGET, None, (), tags))
        elif _holds(one, visible):
            for text in (one.text, *_further_names(one, marks)):
                expressions.setdefault(text, _moved(one, text, new_index, masks))
    rng.shuffle(gone)
    for one in [one for one in gone if not _PLACE.search(one.text)][:_GONE_PER_VIEW]:
        expressions.setdefault(one.text, one)
    return Marks(
        tuple(marks.nouns[index] for index in there),
        tuple(marks.groups[index] for index in there),
        tuple(marks.synonyms[index] for index in there),
        masks[there],
        tuple(expressions.values()),
    )


def _holds(one: NewExpression, visible: np.ndarray) -> bool:
    """Whether an expression still means its target, of whose photograph these shares of the objects are visible."""
    by_words = one.kind in (NAME, "attribute") and not _PLACE.search(one.text)
    needed = [one.target] if by_words else one.candidates
    return all(visible[index] >= _VISIBLE for index in needed) and (by_words or len(one.candidates) > 1)


def _further_names(one: NewExpression, marks: Marks) -> list[str]:
    """More nouns of an object that is asked for by name, which no other object has."""
    if one.kind != NAME or one.target is None:
        return []
    others = {
        word
        for index, (noun, synonyms) in enumerate(zip(marks.nouns, marks.synonyms, strict=True))
        if index != one.target
        for word in (noun, *synonyms)
    }
    return [word for word in marks.synonyms[one.target] if word not in others]


def _moved(one: NewExpression, text: str, new_index: dict[int, int], masks: np.ndarray) -> NewExpression:
    """The expression with these words, among the objects that are left."""
    assert one.target is not None
    tags = tuple(
        (key, size_word(float(masks[one.target].mean())) if key == "size" else value) for key, value in one.tags
    )
    candidates = tuple(new_index[index] for index in one.candidates if index in new_index)
    return dataclasses.replace(one, text=text, target=new_index[one.target], candidates=candidates, tags=tags)


def _finished(pixels: np.ndarray, marks: Marks, mirrored: bool) -> View:
    """The view at its final size, mirrored if that is wanted and every expression can be."""
    height, width = pixels.shape[:2]
    scale = min(1.0, _LONGER_SIDE / max(height, width))
    masks = marks.masks
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        smaller = [cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5 for mask in masks]
        # A sliver that vanishes when it is made smaller keeps one pixel of its own: a mask must not be empty.
        masks = np.stack([_not_empty(small, mask) for small, mask in zip(smaller, masks, strict=True)])
    expressions = marks.expressions
    if mirrored and all(can_mirror(one.text) for one in expressions):
        pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
        expressions = tuple(dataclasses.replace(one, text=mirror_text(one.text)) for one in expressions)
    return View(np.ascontiguousarray(pixels), dataclasses.replace(marks, masks=masks, expressions=expressions))


def _not_empty(small: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The smaller mask, with the pixel at the mask's first point if it lost all."""
    if not small.any():
        row, column = np.argwhere(mask)[0]
        small[row * small.shape[0] // mask.shape[0], column * small.shape[1] // mask.shape[1]] = True
    return small
