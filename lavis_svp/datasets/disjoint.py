"""Images shared between the splits of the RefCOCO family: counting them, and leaving them out of training.

RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO were all made from COCO's train2014 images and split each on its own, so that
the training split of one holds images of another's val and test. :func:`leak_table` counts them from the references.
:func:`make_disjoint` is ``run.image_disjoint``: no image of any val or test split is trained on. Held out is every
split but train of these four whose references lie below the root of one of the data sets of the run, trained on or not,
in the partition that the run uses, else in the usual one. For data sets in shards without references, the splits in the
shards count; for other data sets, the splits that the run loads for validation or test.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lavis_svp.datasets.layout import COUNTS, PUBLIC, annotation_files, dataset_spec
from lavis_svp.datasets.refcoco import split_images
from lavis_svp.datasets.sources import AnnotationSource, ReferredImage

TRAIN = "train"
AUTO = "auto"
SWITCH = "run.image_disjoint"

_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.\w+")


def coco_id(file_name: str) -> int | None:
    """COCO's id of an image by its file name, or None if it is not COCO's.

    The names are ``COCO_train2014_000000098304.jpg``, or ``000000098304.jpg`` as in COCO 2017; folders are ignored.
    The ids of other data sets count something else and must never be compared with COCO's, so the name decides.
    """
    match = _COCO_NAME.fullmatch(Path(file_name).name)
    return None if match is None else int(match[1])


@dataclass(frozen=True)
class SplitUse:
    """Which COCO images the splits of one data set in one partition are about.

    Args:
        dataset: its name.
        split_by: its partition.
        splits: {split: {COCO image id: number of expressions}}.
    """

    dataset: str
    split_by: str
    splits: Mapping[str, Counter[int]]

    @property
    def name(self) -> str:
        """The name of the data set in its partition."""
        return title(self.dataset, self.split_by)

    def held_out(self) -> dict[str, Counter[int]]:
        """Every split but train, by its full name, e.g. "refcoco (unc) testA"."""
        return {f"{self.name} {split}": images for split, images in self.splits.items() if split != TRAIN}


class Shared(NamedTuple):
    """How many of a training split's images are held out elsewhere, and how many expressions these have in it."""

    images: int
    expressions: int

    def __str__(self) -> str:
        return f"{self.images:,} ({self.expressions:,})"


def title(dataset: str, split_by: str) -> str:
    """The name of a data set in one partition."""
    return f"{dataset} ({split_by})"


def read_use(root: str | Path, dataset: str, split_by: str) -> SplitUse | None:
    """Read one file of references below ``root``; None if it is not there, a ValueError if it is damaged."""
    path = annotation_files(root, dataset, split_by).refs
    return SplitUse(dataset, split_by, split_images(path)) if path.is_file() else None


def shared(train: Mapping[int, int], held_out: Collection[int]) -> Shared:
    """Count what a training split, {image id: number of expressions}, shares with held-out images."""
    common = [image_id for image_id in train if image_id in held_out]
    return Shared(len(common), sum(train[image_id] for image_id in common))


def leak_table(uses: Sequence[SplitUse]) -> list[list[str]]:
    """Rows of text: a head, one row for each held-out split, their union, and the totals of the training splits."""
    trains = {use.name: use.splits[TRAIN] for use in uses if TRAIN in use.splits}
    held: dict[str, Collection[int]] = {name: images for use in uses for name, images in use.held_out().items()}
    held["any of them"] = set().union(*held.values())
    return [
        ["", "images", *(f"{name} train" for name in trains)],
        *(
            [name, f"{len(images):,}", *(str(shared(train, images)) for train in trains.values())]
            for name, images in held.items()
        ),
        ["the training split holds", "", *(str(shared(train, train)) for train in trains.values())],
    ]


def make_disjoint(datasets: Mapping[str, Mapping[str, Any]], switch: bool | str = AUTO) -> dict[str, Any] | None:
    """Count the held-out images in the training sets, and leave them out.

    Args:
        datasets: {builder's name: {split: data set}}; the training sets with COCO's images are changed in place.
        switch: True: leave out; False: count only; "auto": leave out if several training sets have COCO's images.

    Returns:
        a report fit for JSON; None if nothing was searched: no COCO images, or one such set without True.
        "left_out": whether the images were; "held_out": the splits that were read, and how many images each has;
        "not_checked": data sets, or splits, that are not there; "shared": for each training set, "images" and
        "expressions" that are held out, "of_images" and "of_expressions" in all, and "by_split", where an image
        counts in each split that has it.

    Raises:
        ValueError: True, but there is no held-out split to check against; or nothing would be left to train on.
    """
    trained = {name: coco for name, splits in datasets.items() if (coco := _coco_images(splits.get(TRAIN)))}
    if not trained or (switch is not True and len(trained) < 2):
        return None
    uses, absent = read_family([one for splits in datasets.values() for one in splits.values()])
    held = {name: set(images) for use in uses for name, images in use.held_out().items()}
    for name, splits in datasets.items():  # what the run validates or tests on of other data sets, such as own shards
        for split, one in splits.items():
            own = set(_expressions_per_image(_coco_images(one)))
            if own and split != TRAIN and getattr(one, "origin", None) is None:
                held[f"{name} {split}"] = own
    if switch is True and not held:
        raise ValueError(
            f"{SWITCH} is true, but no val or test split of {', '.join(PUBLIC)} is below the roots of the data sets: "
            "there is nothing to check against."
        )
    union: set[int] = set().union(*held.values())
    report: dict[str, Any] = {
        "left_out": bool(switch),
        "held_out": {name: len(images) for name, images in held.items()},
        "not_checked": absent,
        "shared": {name: _count(images, held, union) for name, images in trained.items()},
    }
    if switch:
        for name, images in trained.items():
            dataset, dropped = datasets[name][TRAIN], [one for one in images if coco_id(one.file_name) in union]
            dataset.leave_out(dropped)
            if not len(dataset):
                raise ValueError(
                    f"{SWITCH} leaves nothing of {name} to train on: all its {len(dropped):,} images are held out."
                )
    _log(report)
    return report


def read_family(datasets: Sequence[Any]) -> tuple[list[SplitUse], list[str]]:
    """Find out which images the splits of the whole RefCOCO family are about.

    Args:
        datasets: of the run. Those with an ``origin`` give the roots, and the partitions that count besides the usual
            ones; where a root has no references (the data set is in shards), their ``source`` lists its splits.

    Returns:
        the uses that were read, and the names of what is absent: a data set, or the splits that its source lacks.
    """
    members = [one for one in datasets if getattr(one, "origin", None) is not None]
    roots = list(dict.fromkeys(one.origin.root for one in members))
    read, absent = [], []
    for dataset in PUBLIC:
        usual = dataset_spec(dataset).split_by[0]
        used = {
            one.origin.split_by or usual: one.source.annotations for one in members if one.origin.dataset == dataset
        }
        for split_by in used or [usual]:
            uses = [use for root in roots if (use := read_use(root, dataset, split_by)) is not None]
            if not uses and split_by in used:
                source: AnnotationSource = used[split_by]
                uses = [
                    SplitUse(
                        dataset, split_by, {one: _expressions_per_image(source.images(one)) for one in source.splits()}
                    )
                ]
            read += uses[:1]
            lacking = [split for split in COUNTS.get((dataset, split_by), {}) if uses and split not in uses[0].splits]
            if not uses:
                absent.append(title(dataset, split_by))
            absent += [f"{title(dataset, split_by)} {split}" for split in lacking if split != TRAIN]
    return read, absent


def _coco_images(dataset: Any) -> list[ReferredImage]:
    """The images of a data set that are COCO's; empty for other data sets, or none."""
    images = getattr(dataset, "annotation", None) if hasattr(dataset, "leave_out") else None
    return [image for image in images or () if coco_id(image.file_name) is not None]


def _expressions_per_image(images: Sequence[ReferredImage]) -> Counter[int]:
    """How many expressions each of COCO's images has, by COCO's id."""
    counts: Counter[int] = Counter()
    for image in images:
        image_id = coco_id(image.file_name)
        if image_id is not None:
            counts[image_id] += len(image.expressions)
    return counts


def _count(images: Sequence[ReferredImage], held: Mapping[str, set[int]], union: set[int]) -> dict[str, Any]:
    counts = _expressions_per_image(images)
    by_split = {name: shared(counts, ids) for name, ids in held.items()}
    return {
        **shared(counts, union)._asdict(),
        "of_images": len(counts),
        "of_expressions": sum(counts.values()),
        "by_split": {name: count._asdict() for name, count in by_split.items() if count.images},
    }


def _log(report: Mapping[str, Any]) -> None:
    for name, count in report["shared"].items():
        share = f"{count['images']:,} of {count['of_images']:,} training images"
        logging.info(
            "%s: %s (%s of %s expressions) are in a val or test split, and are %s.",
            name, share, f"{count['expressions']:,}", f"{count['of_expressions']:,}",
            "left out" if report["left_out"] else f"trained on nevertheless ({SWITCH} is false)",
        )  # fmt: skip
        for split, part in count["by_split"].items():
            logging.info("  of these in %s: %s images", split, f"{part['images']:,}")
    if report["not_checked"]:
        logging.warning(
            "%s: there are no references of %s to check against; images held out there may be trained on.",
            SWITCH, ", ".join(report["not_checked"]),
        )  # fmt: skip
