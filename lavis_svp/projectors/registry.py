"""Projectors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lavis_svp.common.options import build_options
from lavis_svp.common.registry import Registry
from lavis_svp.projectors.base import Projector
from lavis_svp.projectors.structures import Grid

P = TypeVar("P", bound=type[Projector])
PROJECTORS: Registry[type[Projector]] = Registry("projector")


def register_projector(name: str) -> Callable[[P], P]:
    """Class decorator: register a projector as ``name``, the value of ``model.projector.name`` in the YAML."""

    def decorate(cls: P) -> P:
        PROJECTORS.register(name)(cls)
        cls.name = name
        return cls

    return decorate


def list_projectors() -> list[str]:
    """The names of all projectors, sorted."""
    return PROJECTORS.names()


def build_projector(name: str, *, vision_dim: int, llm_dim: int, grid: Grid, **options: Any) -> Projector:
    """Build a projector.

    Args:
        name: one of :func:`list_projectors`.
        vision_dim: C, width of the patch features.
        llm_dim: D, width of the language model.
        grid: the usual (h, w) patch grid.
        options: the projector's own choices, as they stand under ``model.projector`` in the YAML.

    Raises:
        UnknownNameError: no such projector; lists the known ones.
        ValueError: an option it does not have, or a value it cannot use.
    """
    cls = PROJECTORS.get(name)
    checked = build_options(cls.options_class, options, where=f"model.projector ('{name}')")
    return cls(vision_dim, llm_dim, grid, checked)
