"""``svp_question``: a question as it is put to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor

from lavis_svp.common.options import check_keys, plain
from lavis_svp.datasets.text import clean_question


@registry.register_processor("svp_question")
class SvpQuestionProcessor(BaseProcessor):
    """Cleans a question, see :func:`lavis_svp.datasets.text.clean_question`; it has no options."""

    def __call__(self, item: str) -> str:
        """The cleaned question.

        Raises:
            ValueError: the question is empty.
        """
        return clean_question(item)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> SvpQuestionProcessor:
        """Build it from a YAML section; any key but ``name`` is an error."""
        check_keys(plain(cfg) or {}, ("name",), "svp_question")
        return cls()
