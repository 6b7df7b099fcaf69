"""Reader of the RefCOCO format: a file of references, an ``instances.json``, images.

Reads RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and the plugin's own data sets; ``layout.py`` states where their files lie.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis_svp.common.files import BadFileError, file_errors, one_line, read_json, read_regular, shown
from lavis_svp.common.options import is_whole_number
from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.fields import (
    annotation_ids,
    by_id,
    file_name,
    image_size,
    items,
    mapping,
    text,
    text_pairs,
    texts,
    whole_number,
)
from lavis_svp.datasets.sources import AnnotationSource, Expression, Instance, ReferredImage, SplitCounts

NO_TARGET = -1
"""The annotation id that gRefCOCO gives to an expression that fits nothing in the image."""

MEND = "Download it again."


class RefCOCO(AnnotationSource):
    """The references and annotations of one data set, in memory.

    Args:
        instances_path: ``instances.json``, in COCO's format.
        refs_path: ``refs(unc).p``, ``grefs(unc).json`` ...

    Raises:
        FileNotFoundError: a file is missing.
        BadFileError: a file is damaged, or holds what no annotation is; the message names the file and the entry.
    """

    def __init__(self, instances_path: str | Path, refs_path: str | Path) -> None:
        self.instances_path, self.refs_path = Path(instances_path), Path(refs_path)
        self._index(load_instances(self.instances_path), _load_references(self.refs_path))

    def _index(self, content: Mapping[str, Any], references: list[dict[str, Any]]) -> None:
        """Keep the checked content of both files; readers of other formats bring theirs into this one."""
        self._images = {image["id"]: image for image in content["images"]}
        self._categories = {category["id"]: category["name"] for category in content["categories"]}
        self._annotations = {annotation["id"]: annotation for annotation in content["annotations"]}
        self._of_image: dict[int, list[int]] = {}
        for annotation_id in sorted(self._annotations):
            self._of_image.setdefault(self._annotations[annotation_id]["image_id"], []).append(annotation_id)
        self._references = references

    def splits(self) -> list[str]:
        """Names of all splits in the references, sorted."""
        return sorted({reference["split"] for reference in self._references})

    def counts(self, split: str) -> SplitCounts:
        """How much ``split`` holds, references included; zeros if the references do not have it."""
        chosen = [reference for reference in self._references if reference["split"] == split]
        return SplitCounts(
            references=len(chosen),
            images=len({reference["image_id"] for reference in chosen}),
            sentences=sum(len(reference["sentences"]) for reference in chosen),
        )

    def images(self, split: str) -> list[ReferredImage]:
        """The images of one split by ascending id, their expressions by reference id, then in the file's order.

        References without a sentence are left out, with a warning.

        Raises:
            UnknownNameError: no reference has this split.
            BadFileError: a reference names an image or an annotation that does not exist, or has an empty sentence.
        """
        chosen = [reference for reference in self._references if reference["split"] == split]
        if not chosen:
            raise unknown_name(f"split of {self.refs_path}", split, self.splits())
        grouped: dict[int, list[Expression]] = {}
        seen: Counter[str] = Counter()
        empty = []
        for reference in sorted(chosen, key=lambda reference: reference["ref_id"]):
            expressions = list(self._expressions(reference, seen))
            if expressions:
                grouped.setdefault(reference["image_id"], []).extend(expressions)
            else:
                empty.append(reference["ref_id"])
        if empty:
            logging.warning(
                "%s: %d references of '%s' have no sentence and are left out, such as %s.",
                self.refs_path, len(empty), split, empty[0],
            )  # fmt: skip
        return [self._image(image_id, split, grouped[image_id]) for image_id in sorted(grouped)]

    def instances(self, image: ReferredImage) -> list[Instance]:
        """All annotated objects of an image by ascending annotation id."""
        instances = []
        for annotation_id in self._of_image.get(image.image_id, []):
            annotation = self._annotations[annotation_id]
            category = self._categories.get(annotation.get("category_id"), "")
            words = annotation.get("attributes")
            # some tools write a mapping of flags, which does not describe the object
            attributes = tuple(words) if isinstance(words, list) else ()
            instances.append(Instance(annotation_id, category, attributes, annotation.get("segmentation")))
        return instances

    def where(self, image: ReferredImage) -> str:
        """Names the annotation file and an image."""
        return f"{self.instances_path}: {image.file_name}"

    def _image(self, image_id: int, split: str, expressions: list[Expression]) -> ReferredImage:
        # the file name of ``instances.json``: that of the references carries a suffix and names no file
        image = self._images[image_id]
        return ReferredImage(image_id, image["file_name"], (image["height"], image["width"]), split, tuple(expressions))

    def _expressions(self, reference: Mapping[str, Any], seen: Counter[str]) -> Iterable[Expression]:
        where = f"{self.refs_path}: reference {reference['ref_id']}"
        image_id = reference["image_id"]
        if image_id not in self._images:
            raise BadFileError(f"{where} is about image {image_id}, which {self.instances_path} does not have.")
        targets = self._targets(reference, where)
        for sentence in reference["sentences"]:
            at = f"{where}, sentence {sentence['sent_id']}"
            words = (text(sentence, "sent", at, "") or text(sentence, "raw", at, "")).strip()
            if not words:
                raise BadFileError(f"{at}: the expression is empty.")
            name = f"{reference['ref_id']}-{sentence['sent_id']}"
            seen[name] += 1  # gRefCOCO repeats some ids
            yield Expression(
                expression_id=name if seen[name] == 1 else f"{name}-{seen[name]}",
                text=words,
                kind=text(sentence, "kind", at, "expression" if targets else "no_target"),
                targets=targets,
                candidates=None if sentence.get("candidates") is None else annotation_ids(sentence, "candidates", at),
                tags=text_pairs(sentence, "tags", at),
            )

    def _targets(self, reference: Mapping[str, Any], where: str) -> tuple[int, ...]:
        raw = reference["ann_id"]
        ids = [one for one in (raw if isinstance(raw, list | tuple) else [raw]) if one != NO_TARGET]
        for annotation_id in ids:
            annotation = self._annotations.get(annotation_id)
            if annotation is None or annotation["image_id"] != reference["image_id"]:
                has = "no such annotation" if annotation is None else f"it under image {annotation['image_id']}"
                raise BadFileError(
                    f"{where} names annotation {annotation_id} of image {reference['image_id']}; "
                    f"{self.instances_path} has {has}. Do the two files belong to the same release?"
                )
        return tuple(ids)


def split_images(refs_path: str | Path) -> dict[str, Counter[int]]:
    """Count which images each split is about, from the references alone, which load fast.

    Returns:
        {split: {image id: number of its sentences}}.

    Raises:
        FileNotFoundError: no such file.
        BadFileError: it is damaged.
    """
    splits: dict[str, Counter[int]] = {}
    for reference in _load_references(Path(refs_path)):
        splits.setdefault(reference["split"], Counter())[reference["image_id"]] += len(reference["sentences"])
    return splits


def load_instances(path: Path) -> dict[str, Any]:
    """Load a COCO ``instances.json`` and check all that this package reads of it, but for the segmentations.

    Returns:
        its content; in "images", "annotations" and "categories" each id stands once.

    Raises:
        FileNotFoundError: no such file.
        BadFileError: it is damaged or another kind of file, two entries share an id, an image has no size or a name
            that leads out of its folder, or an annotation is of an unknown category; the message names the entry.
    """
    content = read_json(path, MEND)
    with file_errors(path, MEND):
        missing = {"images", "annotations", "categories"} - set(content if isinstance(content, Mapping) else ())
        if missing:
            raise BadFileError(f"{path} lacks {', '.join(sorted(missing))}; it is no COCO instances file.")
        images, annotations, categories = (
            by_id(content, kind, str(path)) for kind in ("images", "annotations", "categories")
        )
        for number, image in images.items():
            file_name(image, "file_name", f"{path}: image {number}")
            image_size(image, f"{path}: image {number}")
        for number, category in categories.items():
            text(category, "name", f"{path}: category {number}")
        for number, annotation in annotations.items():
            whole_number(annotation, "image_id", f"{path}: annotation {number}")
            category_id = annotation.get("category_id")
            if category_id is not None and not (is_whole_number(category_id) and category_id in categories):
                raise BadFileError(
                    f"{path}: annotation {number} is of category {shown(category_id)}, which the file does not have."
                )
            if isinstance(annotation.get("attributes"), list):
                texts(annotation, "attributes", f"{path}: annotation {number}")
        lists = {"images": images, "annotations": annotations, "categories": categories}
        return {**content, **{kind: list(entries.values()) for kind, entries in lists.items()}}


def _load_references(path: Path) -> list[dict[str, Any]]:
    """Load a file of references; a BadFileError unless their ids are numbers and they have what this package reads."""
    references = read_json(path, MEND) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(references, list):
        raise BadFileError(f"{path} must hold a list of references, it holds a {type(references).__name__}.")
    if not references:
        raise BadFileError(f"{path} holds no reference. {MEND}")
    with file_errors(path, MEND):
        for number, reference in enumerate(references):
            _check_reference(reference, f"{path}: reference number {number}")
    return references


def _check_reference(reference: Any, where: str) -> None:
    needed = ("ref_id", "ann_id", "image_id", "split", "sentences")
    missing = [key for key in needed if not isinstance(reference, dict) or key not in reference]
    if missing:
        raise BadFileError(f"{where} lacks {', '.join(missing)}.")
    whole_number(reference, "ref_id", where)
    whole_number(reference, "image_id", where)
    text(reference, "split", where)
    raw = reference["ann_id"]
    for annotation_id in raw if isinstance(raw, list | tuple) else (raw,):
        if not is_whole_number(annotation_id, NO_TARGET):
            raise BadFileError(
                f"{where}: 'ann_id' must be an annotation's id, or a list of these, it has {shown(annotation_id)}."
            )
    for sentence in items(reference, "sentences", where):
        whole_number(mapping(sentence, f"{where}, a sentence"), "sent_id", where)


class UnsafePickleError(BadFileError):
    """The pickle would import something; nothing of it was imported or run."""


def load_plain_pickle(path: str | Path) -> Any:
    """Load a pickle of lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None, running nothing.

    RefCOCO's ``refs(*).p`` come from Python 2: their byte strings are read as Latin-1 text.

    Raises:
        FileNotFoundError: no such file.
        UnsafePickleError: the pickle names a class or function; the message states which. It is not run.
        BadFileError: the file is truncated, is not a pickle, or would take more memory than its size explains.
    """
    content = read_regular(path)
    _check_pickle(content, path)
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path} {error}") from None
    # Damaged pickles raise nearly anything: the opcodes then index and call at random.
    except Exception as error:
        raise BadFileError(f"{path} is truncated or not a pickle ({one_line(error)}). {MEND}") from error


_PLAIN_CODES = re.compile(
    rb"(?:[(012)NQRabdelosu}\]\x81\x88\x89\x8f-\x94\x97\x98]|[Khq\x80\x82].|[M\x83]..|[Jj\x84].{4}|[G\x95].{8}"
    rb"|[FILPSVg][^\n]*+\n|[ci][^\n]*+\n[^\n]*+\n|p\d{1,7}\n|r...\x00)*+",
    re.DOTALL,
)
"""Codes of a pickle with their arguments, but for those with a length, tuples, and places in the memo from 2^24 on."""

_LENGTHS = {b"\x8a": 1, b"\x8b": 4, b"T": 4, b"U": 1, b"B": 4, b"C": 1, b"\x8e": 8, b"\x96": 8, b"\x8c": 1}
_LENGTHS |= {b"X": 4, b"\x8d": 8}
"""Codes whose argument follows its length, and the bytes of the length."""

_TUPLES = (b"t", b"\x85", b"\x86", b"\x87")
_MAX_TUPLES = 20
"""RefCOCO's files have none. Each may lie in the next one twice, and to hash the last takes 2^20 steps then."""


def _check_pickle(content: bytes, path: str | Path) -> None:
    """Refuse a pickle of a few bytes that takes the memory or the stack of the process; 0.3 s for RefCOCO's 20 MB."""
    place, tuples = 0, 0
    while True:
        place = _PLAIN_CODES.match(content, place).end()  # type: ignore[union-attr]  # it matches nothing at least
        code = content[place : place + 1]
        if code in _LENGTHS:
            start = place + 1 + _LENGTHS[code]
            place = start + int.from_bytes(content[place + 1 : start], "little")
        elif code in _TUPLES and tuples < _MAX_TUPLES:
            place, tuples = place + 1, tuples + 1
        elif code in (*_TUPLES, b"p", b"r"):
            raise BadFileError(
                f"{path} is no pickle of references: at byte {place} it asks for far more memory than its size "
                f"explains, or has over {_MAX_TUPLES:,} tuples. {MEND} Your own references can be JSON instead."
            )
        else:
            return  # the end, or a damaged place, at which the unpickler stops as well


def _bytes_of_latin1(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes into old pickle protocols as a call of ``_codecs.encode(text, 'latin1')``."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"names the text encoding '{encoding}'; plain data needs latin1 only.")
    return text.encode("latin1")


_PLAIN_CALLS = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("_codecs", "encode"): _bytes_of_latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every global but those that plain containers and bytes need."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, fix_imports=True, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) not in _PLAIN_CALLS:
            raise UnsafePickleError(
                f"would import {module}.{name}, which a file of references has no use for. "
                "It was not run. Do not open this file with pickle; get it from a source you trust."
            )
        return _PLAIN_CALLS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"refers to an outside object ({pid!r}); a file of references does not.")
