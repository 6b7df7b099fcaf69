"""Counts the images of one split that stand in another: ``python -m lavis_svp.datasets.leaks --root DIR``.

RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO were all made from COCO's train2014 images and split each on its own, so that
the training split of one holds images of another's val and test. The table has a row for each val or test split and
a column for each training split; a cell says how many images they share, and how many training expressions those
images have. Only the files of references are read, neither ``instances.json`` nor images.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lavis_svp.datasets.layout import PUBLIC, annotation_files, dataset_spec
from lavis_svp.datasets.refcoco import split_images
from lavis_svp.metrics.table import format_table

TRAIN = "train"

_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.\w+")


def coco_id(file_name: str) -> int | None:
    """COCO's id of an image by its file name; None for an image that is not COCO's.

    The ids of other data sets count something else and must never be compared with COCO's, so the name decides.

    Args:
        file_name: ``COCO_train2014_000000098304.jpg``, or ``000000098304.jpg`` as in COCO 2017.
            Folders may stand before it.
    """
    match = _COCO_NAME.fullmatch(Path(file_name).name)
    return None if match is None else int(match[1])


@dataclass(frozen=True)
class SplitUse:
    """Which COCO images the splits of one data set in one partition are about.

    Args:
        dataset: its name.
        split_by: its partition.
        splits: {split: {COCO image id: number of sentences}}.
    """

    dataset: str
    split_by: str
    splits: Mapping[str, Counter[int]]

    @property
    def name(self) -> str:
        """For tables and messages."""
        return title(self.dataset, self.split_by)

    def held_out(self) -> dict[str, Counter[int]]:
        """Every split but train, by its full name, e.g. "refcoco (unc) testA"."""
        return {f"{self.name} {split}": images for split, images in self.splits.items() if split != TRAIN}


@dataclass(frozen=True)
class Shared:
    """What a training split shares with others.

    Args:
        images: how many of its images.
        expressions: how many sentences these have in the training split.
    """

    images: int
    expressions: int

    def __str__(self) -> str:
        return f"{self.images:,} ({self.expressions:,})"


def title(dataset: str, split_by: str) -> str:
    """The name of a data set in one partition."""
    return f"{dataset} ({split_by})"


def read_use(root: str | Path, dataset: str, split_by: str) -> SplitUse | None:
    """Read one file of references; None if it is not there.

    Args:
        root: the folder that holds ``refcoco/`` ...
        dataset: one of ``layout.PUBLIC``.
        split_by: its partition.

    Raises:
        ValueError: the file is damaged.
    """
    path = annotation_files(root, dataset, split_by).refs
    return SplitUse(dataset, split_by, split_images(path)) if path.is_file() else None


def shared(train: Mapping[int, int], held_out: Collection[int]) -> Shared:
    """Count what a training split shares with held-out images.

    Args:
        train: {image id: number of sentences}.
        held_out: image ids of the same kind.
    """
    common = [image_id for image_id in train if image_id in held_out]
    return Shared(len(common), sum(train[image_id] for image_id in common))


def leak_table(found: Sequence[SplitUse]) -> list[list[str]]:
    """Rows of text: a head, one row for each held-out split, their union, and what the training splits hold in all."""
    trains = {use.name: use.splits[TRAIN] for use in found if TRAIN in use.splits}
    held = {name: images for use in found for name, images in use.held_out().items()}
    union = set().union(*held.values())
    rows = [["", "images", *(f"{name} train" for name in trains)]]
    for name, images in [*held.items(), ("any of them", union)]:
        rows.append([name, f"{len(images):,}", *(str(shared(train, images)) for train in trains.values())])
    whole = [str(Shared(len(train), sum(train.values()))) for train in trains.values()]
    return [*rows, ["the training split holds", "", *whole]]


def _partitions(chosen: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, split_by) for name in chosen for split_by in dataset_spec(name).split_by]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 if at least one file of references was read."""
    parser = argparse.ArgumentParser(prog="python -m lavis_svp.datasets.leaks", description=__doc__)
    parser.add_argument("--root", required=True, type=Path, help="the folder that holds refcoco/, refcoco+/ ...")
    parser.add_argument("--usual", action="store_true", help="leave out partitions that few use (refcoco(g): google)")
    given = parser.parse_args(arguments)
    wanted = [(name, dataset_spec(name).split_by[0]) for name in PUBLIC] if given.usual else _partitions(PUBLIC)
    read = {(name, split_by): read_use(given.root, name, split_by) for name, split_by in wanted}
    found = [use for use in read.values() if use is not None]
    absent = [title(*key) for key, use in read.items() if use is None]
    if found:
        print("Images of each training split that are held out elsewhere (and their training expressions):\n")
        print(format_table(leak_table(found)))
    if absent:
        print(f"\nNot there, so not counted: {', '.join(absent)}. See python -m lavis_svp.datasets.doctor --help")
    return int(not found)


if __name__ == "__main__":
    sys.exit(main())
