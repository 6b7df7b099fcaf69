"""All targets, by group; a group is built only if one of its targets is wanted."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.outcomes import Target

GROUPS = ("annotations", "stores", "weights", "models", "images", "settings", "door")


def build_targets(folder: Path, only: Sequence[str] | None = None) -> list[Target]:
    """The wanted targets.

    Args:
        folder: for their files.
        only: names of groups, or beginnings of targets' names; None = all.
    """
    groups = [name for name in only or GROUPS if name in GROUPS]
    beginnings = tuple(name for name in only or () if name not in GROUPS)
    targets: list[Target] = []
    for group in GROUPS:
        if group not in groups and not beginnings:
            continue
        built: list[Target] = importlib.import_module(f"tests.fuzz.{group}").build(folder)
        targets += built if group in groups else [one for one in built if one.name.startswith(beginnings)]
    return targets
