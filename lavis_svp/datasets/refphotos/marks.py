"""What was marked by hand in photographs: objects with masks, and expressions; read and checked.

``photos.json`` lists the photographs and the archives that hold them, ``marks.json`` what was marked:
``{photograph: {"objects": [{"noun", "group", "rle"}], "expressions": [{"text", "kind", "object", "candidates"}]}}``.
"rle" is COCO's compressed run lengths at the photograph's upright size; "object" is an index into the objects, null
where the expression fits nothing; "candidates" are the objects that its words without those of place fit. An object
may have "synonyms", more nouns that hold of it. A photograph's "split" is "test" where the list names none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavis_svp.common.files import BadFileError, file_errors, read_json, shown
from lavis_svp.common.options import is_whole_number
from lavis_svp.datasets.fields import items, mapping, text, texts, whole_number
from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.datasets.refcoco_writer import NewExpression
from lavis_svp.zoo.entries import PublishedArchive

NAME, NO_TARGET = "name", "no_target"
KINDS = (NAME, "attribute", "relation", "superlative", NO_TARGET)
GROUPS = (
    "people", "animals", "food", "plants", "vehicles", "household", "electronics", "clothing", "sports and toys",
    "tools", "buildings", "nature", "other",
)  # fmt: skip
CLUTTER = ("few", "scene")
SMALL, LARGE = 0.02, 0.10
"""Shares of the image: a target below the first is small, one above the second is large."""

PARTS = frozenset({
    "antler", "beak", "branch", "chimney", "collar", "door", "drawer", "ear", "eye", "face", "flower center", "handle",
    "hair", "hand", "head", "icing", "leaf", "leg", "reflection", "roof", "tail", "tree trunk", "windshield", "wheel",
    "window", "wing", "wrapper",
})  # fmt: skip
STUFF = frozenset({
    "beach", "forest", "grass", "ground", "hill", "island", "mountain", "road", "sand", "sea", "sky", "snow", "water",
    "wave",
})  # fmt: skip
"""Nouns of parts of things, and of what has no outline of its own; RefCOCO's annotators marked neither."""
_OBJECT_KEYS, _OPTIONAL_OBJECT_KEYS = ("noun", "group", "rle"), ("synonyms",)
_EXPRESSION_KEYS = ("text", "kind", "object", "candidates")


@dataclass(frozen=True)
class MarkedPhotos:
    """A data set of photographs that were marked by hand.

    Args:
        name: of the data set, and of its folders.
        folder: that holds ``photos.json`` and ``marks.json``.
        splits: that its photographs may be in.
    """

    name: str
    folder: Path
    splits: tuple[str, ...]

    @property
    def photos_file(self) -> Path:
        """The list of its photographs."""
        return self.folder / "photos.json"

    @property
    def marks_file(self) -> Path:
        """What was marked in them."""
        return self.folder / "marks.json"


TRAIN, TEST = "train", "test"
REFPHOTOS = MarkedPhotos("refphotos", Path(__file__).parent, (TEST,))


@dataclass(frozen=True)
class ListedPhoto:
    """A photograph of ``photos.json``.

    Args:
        name: its name in ``marks.json``, and of its file.
        archive: the package that holds it.
        member: its name in the archive.
        sha256: of its file.
        size: (H, W), upright.
        clutter: "few" (one to three subjects) or "scene".
        split: "train", "val" or "test".
    """

    name: str
    archive: PublishedArchive
    member: str
    sha256: str
    size: tuple[int, int]
    clutter: str
    split: str = TEST

    @property
    def file_name(self) -> str:
        """The name of its file in the data set: its own bytes under its own ending."""
        return self.name + Path(self.member).suffix.lower()


@dataclass(frozen=True)
class Marks:
    """What was marked in a photograph.

    Args:
        nouns: K names of its objects.
        groups: K of the ``GROUPS``.
        synonyms: for each of the K objects, more nouns that hold of it.
        masks: (K, H, W) bool.
        expressions: with the tags group, clutter, size and what; of those that fit nothing, clutter alone.
    """

    nouns: tuple[str, ...]
    groups: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    masks: np.ndarray
    expressions: tuple[NewExpression, ...]


def load_photos(dataset: MarkedPhotos = REFPHOTOS) -> list[ListedPhoto]:
    """All photographs of a data set, in the file's order; a BadFileError where the list is damaged."""
    path = dataset.photos_file
    content = read_json(path)
    with file_errors(path):
        archives = {entry["package"]: PublishedArchive(**entry) for entry in content["archives"]}
        photos = [
            ListedPhoto(
                one["name"], archives[one["package"]], one["member"], one["sha256"],
                (one["size"][1], one["size"][0]), one["clutter"], one.get("split", TEST),
            )
            for one in content["photos"]
        ]  # fmt: skip
        for photo in photos:
            if photo.clutter not in CLUTTER:
                raise BadFileError(f"{path}: {photo.name} has the clutter {photo.clutter!r}; it is one of {CLUTTER}.")
            if photo.split not in dataset.splits:
                raise BadFileError(
                    f"{path}: {photo.name} has the split {photo.split!r}; it is one of {', '.join(dataset.splits)}."
                )
        if len({photo.name for photo in photos}) != len(photos):
            raise BadFileError(f"{path}: two photographs have one name.")
    return photos


def load_marks(dataset: MarkedPhotos = REFPHOTOS) -> dict[str, Mapping[str, Any]]:
    """What was marked, by the photographs' names, as the file has it; :func:`read_marks` reads a photograph's."""
    path = dataset.marks_file
    return {name: mapping(one, f"{path}: {name}") for name, one in mapping(read_json(path), str(path)).items()}


def read_marks(photo: ListedPhoto, content: Mapping[str, Any], where: str) -> Marks:
    """Read and check what was marked in a photograph.

    Args:
        photo: the photograph.
        content: its entry in ``marks.json``.
        where: names the entry in messages.

    Raises:
        BadFileError: a key or value is missing or unknown, a mask is empty or of another size, an expression stands
            twice, or its kind, object and candidates contradict each other.
    """
    _check_keys(content, ("objects", "expressions"), where)
    objects = [_object(one, f"{where}, object {number}") for number, one in enumerate(items(content, "objects", where))]
    if not objects:
        raise BadFileError(f"{where}: no object is marked.")
    masks = np.stack([_mask(one, photo, f"{where}, object {number}") for number, one in enumerate(objects)])
    expressions: list[NewExpression] = []
    for number, one in enumerate(items(content, "expressions", where)):
        expression = _expression(one, objects, masks, photo, f"{where}, expression {number}")
        if any(expression.text == other.text for other in expressions):
            raise BadFileError(f"{where}: the expression {expression.text!r} stands twice.")
        expressions.append(expression)
    return Marks(
        tuple(one["noun"] for one in objects),
        tuple(one["group"] for one in objects),
        tuple(tuple(one.get("synonyms", ())) for one in objects),
        masks,
        tuple(expressions),
    )


def what_word(noun: str) -> str:
    """Whether a noun names a ``thing``, a ``part`` of one, or ``stuff``."""
    return "part" if noun in PARTS else "stuff" if noun in STUFF else "thing"


def size_word(share: float) -> str:
    """Small, medium or large: the tag of a target that covers this share of the image."""
    return "small" if share < SMALL else "large" if share > LARGE else "medium"


def _object(content: Any, where: str) -> Mapping[str, Any]:
    entry = mapping(content, where)
    _check_keys(entry, _OBJECT_KEYS, where, _OPTIONAL_OBJECT_KEYS)
    for key in _OBJECT_KEYS:
        text(entry, key, where)
    for word in texts(entry, "synonyms", where):
        if not word or word != " ".join(word.lower().split()):
            raise BadFileError(f"{where}: the synonym {word!r} is empty, not in lower case, or has spaces too many.")
    if entry["noun"] != entry["noun"].strip().lower():
        raise BadFileError(f"{where}: the noun {entry['noun']!r} is not in lower case.")
    if entry["group"] not in GROUPS:
        raise BadFileError(f"{where}: the group {entry['group']!r} is none of {', '.join(GROUPS)}.")
    return entry


def _mask(entry: Mapping[str, Any], photo: ListedPhoto, where: str) -> np.ndarray:
    """(H, W) bool."""
    with file_errors(where):
        mask = decode_segmentation({"size": list(photo.size), "counts": entry["rle"]}, photo.size) > 0
        if not mask.any():
            raise BadFileError(f"{where}: the mask is empty.")
    return mask


def _expression(
    content: Any, objects: list[Mapping[str, Any]], masks: np.ndarray, photo: ListedPhoto, where: str
) -> NewExpression:
    entry = mapping(content, where)
    _check_keys(entry, _EXPRESSION_KEYS, where)
    words, kind = text(entry, "text", where), text(entry, "kind", where)
    if words != " ".join(words.lower().split()):
        raise BadFileError(f"{where}: {words!r} is not in lower case, or has spaces too many.")
    if kind not in KINDS:
        raise BadFileError(f"{where}: the kind {kind!r} is none of {', '.join(KINDS)}.")
    candidates = tuple(items(entry, "candidates", where))
    if not all(is_whole_number(one, 0, len(objects) - 1) for one in candidates):
        raise BadFileError(f"{where}: the candidates {shown(candidates)} are no indices of {len(objects)} objects.")
    tags = {"clutter": photo.clutter}
    target: int | None = None
    if entry["object"] is not None:
        target = whole_number(entry, "object", where)
        if target not in candidates:
            raise BadFileError(f"{where}: the object {target} is not among its candidates {shown(candidates)}.")
        size = size_word(float(masks[target].mean()))
        tags = {"group": objects[target]["group"], **tags, "size": size, "what": what_word(objects[target]["noun"])}
    if (kind == NO_TARGET) != (target is None) or (target is None and candidates):
        raise BadFileError(
            f"{where}: kind {kind!r}, object {entry['object']} and candidates {shown(candidates)} contradict each "
            f"other; {NO_TARGET} has neither an object nor candidates."
        )
    return NewExpression(words, kind, kind, target, candidates, tuple(tags.items()))


def _check_keys(entry: Mapping[str, Any], keys: tuple[str, ...], where: str, optional: tuple[str, ...] = ()) -> None:
    if set(entry) - set(optional) != set(keys):
        raise BadFileError(f"{where} must have the keys {', '.join(keys)}; it has {shown(list(entry))}.")
