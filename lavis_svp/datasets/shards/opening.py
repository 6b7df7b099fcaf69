"""Opens a folder of shards for a builder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lavis_svp.datasets.layout import SPECS
from lavis_svp.datasets.shards.source import ShardSource
from lavis_svp.datasets.shards.stored import ShardFeatures, ShardSuperpixels


@dataclass(frozen=True)
class OpenedShards:
    """A folder of shards.

    Args:
        source: annotations and images.
        superpixels: where they were converted with superpixels, and those are wanted.
        features: likewise.
    """

    source: ShardSource
    superpixels: ShardSuperpixels | None
    features: ShardFeatures | None


def open_shards(folder: str | Path, use_stored: bool = True) -> OpenedShards:
    """Open a folder of shards.

    Args:
        folder: with ``index.json``.
        use_stored: serve the superpixels and features that they may hold.

    Raises:
        FileNotFoundError, ValueError: see :func:`~lavis_svp.datasets.shards.index.read_index`.
    """
    source = ShardSource(folder)
    has = {kind: use_stored and source.index.settings.get(kind) is not None for kind in ("superpixels", "features")}
    return OpenedShards(
        source,
        ShardSuperpixels(source) if has["superpixels"] else None,
        ShardFeatures(source) if has["features"] else None,
    )


def check_origin(source: ShardSource, dataset: str | None, split_by: str | None, where: str) -> None:
    """Refuse shards of another data set than the builder's.

    Args:
        source: the shards.
        dataset: the builder's, a key of ``layout.SPECS``; None takes all.
        split_by: the partition that is wanted; None = the usual one.
        where: the section, for the message.

    Raises:
        ValueError: they were made from another data set or partition.
    """
    if dataset is None:
        return
    wanted = (dataset, split_by or SPECS[dataset].split_by[0])
    origin = source.index.settings.get("source", {})
    found = (origin.get("dataset"), origin.get("split_by"))
    if found != wanted:
        made = f"{found[0]} ({found[1]})" if found[0] else str(origin.get("format"))
        raise ValueError(
            f"{where} wants {wanted[0]} ({wanted[1]}), but the shards in {source.folder} were made from {made}. "
            "Data of one's own: use the builder referring_shards_seg."
        )
