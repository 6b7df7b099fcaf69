"""The hand-written expressions about the photos: ``expressions.json``, keyed by photo and instance index.

An entry is ``[text, kind, candidates]``: the candidates are the indices of the instances that the expression's
attributes alone fit. Under "none" stand expressions that mean nothing in the photo.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

EXPRESSIONS_FILE = Path(__file__).parent / "expressions.json"
NO_INSTANCE = "none"


@dataclass(frozen=True)
class PhotoExpression:
    """One expression about a photo.

    Attributes:
        text: the English words.
        kind: "attribute", "relation", "superlative" or "no_target".
        target: index of the instance it means; None if there is no such thing in the photo.
        candidates: indices of the instances that its attributes fit, the target among them.
    """

    text: str
    kind: str
    target: int | None
    candidates: tuple[int, ...]


def load_expressions() -> dict[str, list[PhotoExpression]]:
    """All expressions, by photo, in the file's order."""
    content = json.loads(EXPRESSIONS_FILE.read_text(encoding="utf-8"))
    return {
        photo: [
            PhotoExpression(text, kind, None if index == NO_INSTANCE else int(index), tuple(candidates))
            for index, entries in by_instance.items()
            for text, kind, candidates in entries
        ]
        for photo, by_instance in content.items()
    }
