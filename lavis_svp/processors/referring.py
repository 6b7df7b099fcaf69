"""``svp_referring``: an expression as it stands in a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor

from lavis_svp.common.options import check_keys, plain
from lavis_svp.datasets.text import clean_expression


@registry.register_processor("svp_referring")
class SvpReferringProcessor(BaseProcessor):
    """Cleans a referring expression, see :func:`lavis_svp.datasets.text.clean_expression`; it has no options.

    The question around the expression is the language side's.
    """

    def __call__(self, item: str) -> str:
        """The cleaned expression.

        Raises:
            ValueError: the expression is empty.
        """
        return clean_expression(item)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> SvpReferringProcessor:
        """Build it from a YAML section; any key but ``name`` is an error."""
        check_keys(plain(cfg) or {}, ("name",), "svp_referring")
        return cls()
