"""Reader of COCO-format instances whose annotations carry expressions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_svp.datasets.refcoco import RefCOCO, load_instances, load_json
from lavis_svp.datasets.source import inside

TEXT_KEY = "expressions"
DEFAULT_SPLIT = "train"
OTHER_TEXT_KEYS = ("caption", "captions", "expression", "sentences", "refer", "description", "phrase")
"""Where others keep the words; named in the message when ``TEXT_KEY`` is not found."""


class CocoExpressions(RefCOCO):
    """Images, masks and expressions of a COCO ``instances.json``.

    Each annotation may have one more key, ``expressions``: a text or a list of texts that name this object. They may
    stand in a file of their own instead: ``{"<annotation id>": text or list of texts}``. An image's split is its
    ``split``, "train" if it has none. Expression ids are ``<annotation id>-<number>``. Images without expressions are
    left out.

    Args:
        instances_path: the COCO file.
        expressions_path: the file of expressions; None = they are in the annotations.
        text_key: the annotations' key.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, an annotation is unknown, a text is empty, or there is no expression at all.
    """

    def __init__(
        self, instances_path: str | Path, expressions_path: str | Path | None = None, text_key: str = TEXT_KEY
    ) -> None:
        self.instances_path = Path(instances_path)
        self.refs_path = self.instances_path if expressions_path is None else Path(expressions_path)
        content = load_instances(self.instances_path)
        if expressions_path is None:
            texts = {one["id"]: one[text_key] for one in content["annotations"] if text_key in one}
        else:
            texts = self._texts_of_file(content)
        if not texts:
            raise ValueError(_nothing_found(self.refs_path, content, text_key))
        images = {int(image["id"]): image for image in content["images"]}
        references = [
            self._reference(annotation, texts[annotation["id"]], images)
            for annotation in content["annotations"]
            if annotation["id"] in texts
        ]
        self._take(content, references)

    def _texts_of_file(self, content: Mapping[str, Any]) -> dict[Any, Any]:
        given = load_json(self.refs_path)
        if not isinstance(given, Mapping):
            raise ValueError(f"{self.refs_path} must map annotation ids to texts, it holds a {type(given).__name__}.")
        ids = {str(one["id"]): one["id"] for one in content["annotations"]}
        unknown = sorted(set(given) - set(ids))
        if unknown:
            raise ValueError(
                f"{self.refs_path} names {len(unknown)} annotations that {self.instances_path} does not have: "
                f"{', '.join(unknown[:5])}."
            )
        return {ids[name]: texts for name, texts in given.items()}

    def _reference(self, annotation: Mapping[str, Any], given: Any, images: Mapping[int, Any]) -> dict[str, Any]:
        texts = [given] if isinstance(given, str) else given
        where = f"{self.refs_path}: annotation {annotation['id']}"
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where} must have a text, or a list of texts that are not empty; it has {given!r}.")
        image_id = int(annotation["image_id"])
        if image_id not in images:
            raise ValueError(f"{where} is about image {image_id}, which is not there.")
        try:
            inside(str(images[image_id]["file_name"]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
        return {
            "ref_id": int(annotation["id"]),
            "ann_id": int(annotation["id"]),
            "image_id": image_id,
            "split": str(images[image_id].get("split") or DEFAULT_SPLIT),
            "sentences": [{"sent_id": number, "sent": text} for number, text in enumerate(texts)],
        }


def _nothing_found(path: Path, content: Mapping[str, Any], text_key: str) -> str:
    others = [key for key in OTHER_TEXT_KEYS if any(key in one for one in content["annotations"])]
    hint = f" They have '{others[0]}': say --text-key {others[0]}." if others else ""
    return f"No annotation of {path} has '{text_key}', a text or a list of texts.{hint}"
