"""LAVIS processors: ``image`` (the tensor for the encoders), ``superpixel`` (its regions), ``text`` (the sentence)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from lavis.processors.base_processor import BaseProcessor

from lavis_svp.common.options import build_options, plain


class OptionsProcessor(BaseProcessor):
    """A processor that is built from a YAML section.

    Args:
        options: an ``options_cls``; None = its defaults.
    """

    name: ClassVar[str]
    """The processor's registered name."""
    options_cls: ClassVar[type[Any]]

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.options = self.options_cls() if options is None else options

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """Build it from a YAML section; an unknown key is an error that names it."""
        section = {key: value for key, value in (plain(cfg) or {}).items() if key != "name"}
        return cls(build_options(cls.options_cls, section, cls.name))
