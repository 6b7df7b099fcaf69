"""``run.train_dataset_ratios``: how much of training comes from each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from lavis_svp.common.options import check_keys

KEY = "run.train_dataset_ratios"


def check_ratios(given: Any) -> None:
    """Refuse what cannot be ratios, whatever the data sets are.

    Args:
        given: None, a list of weights, or {builder's name: weight}.

    Raises:
        ValueError: something else, or a weight that is no number above 0.
    """
    if given is None:
        return
    if isinstance(given, str) or not isinstance(given, Mapping | Sequence) or not given:
        raise ValueError(
            f"{KEY} is {given!r}; it must be a list with a weight for each data set that is trained on, "
            "or a mapping from their names to weights."
        )
    named = given.items() if isinstance(given, Mapping) else enumerate(given, start=1)
    for name, value in named:
        if _weight(value) is None:
            raise ValueError(
                f"{KEY}: the weight of {name} is {value!r}; it must be a number above 0. To leave a data set out, "
                "take it out of the section datasets."
            )


def weights_of(given: Any, names: Sequence[str]) -> list[Fraction]:
    """The weight of each data set, exactly as written: 0.1 is a tenth.

    Args:
        given: as for :func:`check_ratios`, not None.
        names: the data sets that are trained on, in the order of the YAML.

    Raises:
        ValueError: an unknown name, or not exactly one weight for each data set.
    """
    check_ratios(given)
    if isinstance(given, Mapping):
        check_keys(given, names, KEY)
        lacking = [name for name in names if name not in given]
        if lacking:
            raise ValueError(f"{KEY} has no weight for {', '.join(lacking)}, which is trained on, too.")
        values = [given[name] for name in names]
    else:
        values = list(given)
        if len(values) != len(names):
            raise ValueError(
                f"{KEY} has {len(values)} weights for {len(names)} data sets that are trained on: {', '.join(names)}."
            )
    return [weight for weight in map(_weight, values) if weight is not None]


def _weight(value: Any) -> Fraction | None:
    """The number as written; None if it is none, or not above 0."""
    if isinstance(value, bool):
        return None
    try:
        weight = Fraction(str(value))  # YAML reads 1e-1 as text
    except (ValueError, ZeroDivisionError):
        return None
    return weight if weight > 0 else None
