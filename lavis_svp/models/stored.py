"""Superpixels and frozen features that came with the data: checked against the model, then used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis_svp.models.frozen import FrozenFeatureExtractor
from lavis_svp.superpixels.cache import check_settings


def attach_precomputed(frozen: FrozenFeatureExtractor, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the data sets serve the features that came with them; superpixels they serve already.

    Args:
        frozen: the model's frozen half.
        datasets: ``{name: {split: data set}}``.

    Raises:
        ValueError: see :func:`check_precomputed`.
    """
    check_precomputed(frozen, datasets)
    for split in (split for by_split in datasets.values() for split in by_split.values()):
        if precomputed_of(split, "features") is not None:
            split.frozen_cache = precomputed_of(split, "features")


def check_precomputed(frozen: FrozenFeatureExtractor, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse superpixels and features that came with the data but are not what this model would make.

    Args:
        frozen: the model's frozen half.
        datasets: ``{name: {split: data set}}``.

    Raises:
        ValueError: made with other settings or weights; names the data set and what differs.
    """
    for kind, maker in {"superpixels": frozen.generator, "features": frozen}.items():
        found = {
            name: precomputed_of(split, kind) for name, by_split in datasets.items() for split in by_split.values()
        }
        given = {name: stored.settings for name, stored in found.items() if stored is not None}
        if maker is None or not given:
            continue
        wanted = maker.settings()  # sums up weights: once
        for name, settings in given.items():
            try:
                check_settings(settings, wanted, f"data set {name}", kind)
            except ValueError as error:
                raise ValueError(
                    f"{error} Or leave what the shards hold: datasets.{name}.build_info.use_stored=false."
                ) from error


def precomputed_of(split: Any, kind: str) -> Any:
    """What came with a data set, or None; ``kind`` is "superpixels" or "features"."""
    return getattr(split, f"stored_{kind}", None)
