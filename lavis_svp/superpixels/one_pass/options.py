"""Settings of the one-pass superpixels: which head finds the boundaries, and how many regions remain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavis_svp.common.options import build_options, check_whole_number, is_number


@dataclass(frozen=True)
class OnePassOptions:
    """Which boundary head, and which cut of its hierarchy.

    Args:
        head: name of a head that comes with the package, or the path of a file that ``lavis-svp superpixels train``
            wrote. It has to be trained on the embeddings of the SAM in use.
        min_strength: the finest map: every merge that costs less than this is carried out; 0 = none is. A cost lies in
            0..1 and is about the strength of the common boundary, see :mod:`.hierarchy`.
        granularity: a dial from 0, about ten regions, to 1, every region of the finest map, linear in their number. A
            lower value never gives more regions, and its regions are unions of those of a higher one. None = 1.
        max_superpixels: the token budget: regions beyond this many are merged, the cheapest merge first; None = no
            limit.

    Raises:
        ValueError: a value is out of range.
    """

    head: str = "one_pass_mobile_sam"
    min_strength: float = 0.2
    granularity: float | None = None
    max_superpixels: int | None = 96

    def __post_init__(self) -> None:
        if not self.head:
            raise ValueError("OnePassOptions.head must name a boundary head or its file, got ''.")
        shares = {"min_strength": self.min_strength}
        if self.granularity is not None:
            shares["granularity"] = self.granularity
        for name, value in shares.items():
            if not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"OnePassOptions.{name} must lie in 0..1, got {value!r}.")
        if self.max_superpixels is not None:
            check_whole_number("OnePassOptions.max_superpixels", self.max_superpixels, 1)

    def settings(self) -> dict[str, Any]:
        """The options that change the result but for the head, of which the digest of its weights tells more."""
        granularity = None if self.granularity is None else float(self.granularity)
        return {
            "min_strength": float(self.min_strength),
            "granularity": granularity,
            "max_superpixels": self.max_superpixels,
        }


def one_pass_options(options: Mapping[str, Any]) -> OnePassOptions:
    """Build the options out of a YAML section.

    Raises:
        ValueError: an unknown option, or a value out of range.
    """
    return build_options(OnePassOptions, options, "the options of superpixels 'one_pass'")
