"""Reader of the RefCOCO format: a file of references, an ``instances.json``, images.

Reads RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and the plugin's own data sets; ``layout.py`` states where their files lie.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis_svp.common.files import BadFileError, relative_name
from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.sources import AnnotationSource, Expression, Instance, ReferredImage, SplitCounts

NO_TARGET = -1
"""The annotation id that gRefCOCO gives to an expression that fits nothing in the image."""


class RefCOCO(AnnotationSource):
    """The references and annotations of one data set, in memory.

    Args:
        instances_path: ``instances.json``, in COCO's format.
        refs_path: ``refs(unc).p``, ``grefs(unc).json`` ...

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the two do not fit together; the message names the reference.
    """

    def __init__(self, instances_path: str | Path, refs_path: str | Path) -> None:
        self.instances_path, self.refs_path = Path(instances_path), Path(refs_path)
        self._index(load_instances(self.instances_path), _load_references(self.refs_path))

    def _index(self, content: Mapping[str, Any], references: list[dict[str, Any]]) -> None:
        """Keep the content of both files; readers of other formats bring theirs into this one."""
        self._images = {int(image["id"]): image for image in content["images"]}
        self._categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        self._annotations = {int(annotation["id"]): annotation for annotation in content["annotations"]}
        self._of_image: dict[int, list[int]] = {}
        for annotation_id in sorted(self._annotations):
            self._of_image.setdefault(int(self._annotations[annotation_id]["image_id"]), []).append(annotation_id)
        self._references = references

    def splits(self) -> list[str]:
        """Names of all splits in the references, sorted."""
        return sorted({str(reference["split"]) for reference in self._references})

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

        Raises:
            UnknownNameError: no reference has this split.
            ValueError: a reference names an image or an annotation that does not exist, or has an empty sentence.
        """
        chosen = [reference for reference in self._references if reference["split"] == split]
        if not chosen:
            raise unknown_name(f"split of {self.refs_path}", split, self.splits())
        grouped: dict[int, list[Expression]] = {}
        seen: Counter[str] = Counter()
        for reference in sorted(chosen, key=lambda reference: int(reference["ref_id"])):
            grouped.setdefault(int(reference["image_id"]), []).extend(self._expressions(reference, seen))
        return [self._image(image_id, split, grouped[image_id]) for image_id in sorted(grouped)]

    def instances(self, image: ReferredImage) -> list[Instance]:
        """All annotated objects of an image by ascending annotation id."""
        instances = []
        for annotation_id in self._of_image.get(image.image_id, []):
            annotation = self._annotations[annotation_id]
            category = self._categories.get(annotation.get("category_id"), "")
            attributes = tuple(str(word) for word in annotation.get("attributes") or ())
            instances.append(Instance(annotation_id, category, attributes, annotation.get("segmentation")))
        return instances

    def _image(self, image_id: int, split: str, expressions: list[Expression]) -> ReferredImage:
        # the file name of ``instances.json``: that of the references carries a suffix and names no file
        image = self._images[image_id]
        name = relative_name(str(image["file_name"]), f"{self.instances_path}: image {image_id}")
        size = (int(image["height"]), int(image["width"]))
        return ReferredImage(image_id, name, size, split, tuple(expressions))

    def _expressions(self, reference: Mapping[str, Any], seen: Counter[str]) -> Iterable[Expression]:
        where = f"{self.refs_path}: reference {reference['ref_id']}"
        image_id = int(reference["image_id"])
        if image_id not in self._images:
            raise ValueError(f"{where} is about image {image_id}, which {self.instances_path} does not have.")
        targets = self._targets(reference, where)
        for sentence in reference["sentences"]:
            text = str(sentence.get("sent") or "").strip() or str(sentence.get("raw") or "").strip()
            if not text:
                raise ValueError(f"{where}, sentence {sentence.get('sent_id')}: the expression is empty.")
            name = f"{reference['ref_id']}-{sentence['sent_id']}"
            seen[name] += 1  # gRefCOCO repeats some ids
            candidates = sentence.get("candidates")
            yield Expression(
                expression_id=name if seen[name] == 1 else f"{name}-{seen[name]}",
                text=text,
                kind=str(sentence.get("kind") or ("expression" if targets else "no_target")),
                targets=targets,
                candidates=None if candidates is None else tuple(int(candidate) for candidate in candidates),
            )

    def _targets(self, reference: Mapping[str, Any], where: str) -> tuple[int, ...]:
        raw = reference["ann_id"]
        ids = [int(one) for one in (raw if isinstance(raw, list | tuple) else [raw]) if int(one) != NO_TARGET]
        for annotation_id in ids:
            annotation = self._annotations.get(annotation_id)
            if annotation is None or int(annotation["image_id"]) != int(reference["image_id"]):
                has = "no such annotation" if annotation is None else f"it under image {annotation['image_id']}"
                raise ValueError(
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
        ValueError: it is damaged.
    """
    splits: dict[str, Counter[int]] = {}
    for reference in _load_references(Path(refs_path)):
        images = splits.setdefault(str(reference["split"]), Counter())
        images[int(reference["image_id"])] += len(reference["sentences"])
    return splits


def load_instances(path: Path) -> dict[str, Any]:
    """Load a COCO ``instances.json``; a ValueError if it is damaged or another kind of file."""
    content = load_json(path)
    missing = {"images", "annotations", "categories"} - set(content if isinstance(content, Mapping) else ())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it is no COCO instances file.")
    return dict(content)


def load_json(path: Path) -> Any:
    """Load a JSON file; a ValueError that names it if it is truncated or not JSON."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
            raise ValueError(f"{path} is truncated or not JSON ({error}). Download it again.") from error


def _load_references(path: Path) -> list[dict[str, Any]]:
    references = load_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(references, list):
        raise ValueError(f"{path} must hold a list of references, it holds a {type(references).__name__}.")
    needed = ("ref_id", "ann_id", "image_id", "split", "sentences")
    for number, reference in enumerate(references):
        missing = [key for key in needed if not isinstance(reference, dict) or key not in reference]
        if missing:
            raise ValueError(f"{path}: reference number {number} lacks {', '.join(missing)}.")
    return references


class UnsafePickleError(BadFileError):
    """The pickle would import something; nothing of it was imported or run."""


def load_plain_pickle(path: str | Path) -> Any:
    """Load a pickle of lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None, running nothing.

    RefCOCO's ``refs(*).p`` come from Python 2: their byte strings are read as Latin-1 text.

    Raises:
        UnsafePickleError: the pickle names a class or function; the message states which. It is not run.
        ValueError: the file is truncated or is not a pickle.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, path).load()
        except UnsafePickleError:
            raise
        # Damaged pickles raise nearly anything: the opcodes then index and call at random.
        except Exception as error:
            raise ValueError(
                f"{path} is truncated or not a pickle ({type(error).__name__}: {error}). Download it again."
            ) from error


def _bytes_of_latin1(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes into old pickle protocols as a call of ``_codecs.encode(text, 'latin1')``."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"The pickle names the text encoding '{encoding}'; plain data needs latin1 only.")
    return text.encode("latin1")


_PLAIN_CALLS = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("_codecs", "encode"): _bytes_of_latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every global but those that plain containers and bytes need."""

    def __init__(self, file: Any, path: str | Path) -> None:
        super().__init__(file, fix_imports=True, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) not in _PLAIN_CALLS:
            raise UnsafePickleError(
                f"{self._path} would import {module}.{name}, which a file of references has no use for. "
                "It was not run. Do not open this file with pickle; get it from a source you trust."
            )
        return _PLAIN_CALLS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"{self._path} refers to an outside object ({pid!r}); a file of references does not.")
