"""``run.image_disjoint``: no image of any RefCOCO val or test split is trained on.

The data sets of the RefCOCO family share COCO's train2014 images and were split each on its own: joint training sees
images of one set's val and test through another's train. What counts as held out is every split but train of RefCOCO,
RefCOCO+, RefCOCOg and gRefCOCO whose references lie below the root of one of the data sets of the run, trained on or
not: in the partition that the run uses, else in the usual one. Of data sets that come in shards without references, the
splits in the shards count. Of other data sets, the splits that the run loads for validation or test count.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lavis_svp.datasets.layout import PUBLIC, dataset_spec
from lavis_svp.datasets.leaks import TRAIN, Shared, SplitUse, coco_id, read_use, shared, title
from lavis_svp.datasets.published import COUNTS
from lavis_svp.datasets.refcoco import ReferredImage

AUTO = "auto"
SWITCH = "run.image_disjoint"


def make_disjoint(datasets: Mapping[str, Mapping[str, Any]], switch: bool | str = AUTO) -> dict[str, Any] | None:
    """Count the held-out images in the training sets, and leave them out.

    Args:
        datasets: {builder's name: {split: data set}}; the training sets with COCO's images are changed in place.
        switch: True: leave out; False: count only; "auto": leave out if several training sets have COCO's images.

    Returns:
        What was found, fit for JSON; None if nothing was looked for: no COCO images, or one such set without True.
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
    held |= _held_out_of_others(datasets)
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
            _leave_out(name, datasets[name][TRAIN], [one for image_id, one in images if image_id in union])
    _tell(report)
    return report


def read_family(datasets: Sequence[Any]) -> tuple[list[SplitUse], list[str]]:
    """Find out which images the splits of the whole RefCOCO family are about.

    Args:
        datasets: of the run. Those with an ``origin`` give the roots, and the partitions that count beside the usual
            ones; where a root has no references (the data set is in shards), their ``source`` says which splits it has.

    Returns:
        what was found, and the names of what was not: a data set, or the splits that its source lacks.
    """
    members = [one for one in datasets if getattr(one, "origin", None) is not None]
    roots = list(dict.fromkeys(one.origin.root for one in members))
    found, absent = [], []
    for dataset in PUBLIC:
        usual = dataset_spec(dataset).split_by[0]
        used = {one.origin.split_by or usual: one.source for one in members if one.origin.dataset == dataset}
        for split_by in used or [usual]:
            uses = [use for root in roots if (use := read_use(root, dataset, split_by)) is not None]
            if not uses and split_by in used:
                uses = [_use_of_source(dataset, split_by, used[split_by])]
            found += uses[:1]
            lacking = [split for split in COUNTS.get((dataset, split_by), {}) if uses and split not in uses[0].splits]
            if not uses:
                absent.append(title(dataset, split_by))
            absent += [f"{title(dataset, split_by)} {split}" for split in lacking if split != TRAIN]
    return found, absent


def _use_of_source(dataset: str, split_by: str, source: Any) -> SplitUse:
    splits = {
        split: Counter(
            {
                image_id: len(image.expressions)
                for image in source.images(split)
                if (image_id := coco_id(image.file_name)) is not None
            }
        )
        for split in source.splits()
    }
    return SplitUse(dataset, split_by, splits)


def _held_out_of_others(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, set[int]]:
    """COCO images that the run validates or tests on in data sets that are not of the family, such as own shards."""
    others = {
        f"{name} {split}": {image_id for image_id, _ in _coco_images(one)}
        for name, splits in datasets.items()
        for split, one in splits.items()
        if split != TRAIN and getattr(one, "origin", None) is None
    }
    return {name: images for name, images in others.items() if images}


def _coco_images(dataset: Any) -> list[tuple[int, ReferredImage]]:
    """The images of a data set that are COCO's, with COCO's id; empty for other data sets, or none."""
    images = getattr(dataset, "annotation", None) if hasattr(dataset, "leave_out") else None
    return [(image_id, one) for one in images or () if (image_id := coco_id(one.file_name)) is not None]


def _count(
    images: Sequence[tuple[int, ReferredImage]], held: Mapping[str, set[int]], union: set[int]
) -> dict[str, Any]:
    sentences: dict[int, int] = {}
    for image_id, image in images:
        sentences[image_id] = sentences.get(image_id, 0) + len(image.expressions)
    whole = Shared(len(sentences), sum(sentences.values()))
    counts = {name: shared(sentences, ids) for name, ids in held.items()}
    return {
        **asdict(shared(sentences, union)),
        "of_images": whole.images,
        "of_expressions": whole.expressions,
        "by_split": {name: asdict(count) for name, count in counts.items() if count.images},
    }


def _leave_out(name: str, dataset: Any, images: Sequence[ReferredImage]) -> None:
    dataset.leave_out(images)
    if not len(dataset):
        raise ValueError(f"{SWITCH} leaves nothing of {name} to train on: all its {len(images):,} images are held out.")


def _tell(report: Mapping[str, Any]) -> None:
    for name, count in report["shared"].items():
        share = f"{count['images']:,} of {count['of_images']:,} training images"
        logging.info(
            "%s: %s (%s of %s expressions) are in a val or test split, and are %s.",
            name, share, f"{count['expressions']:,}", f"{count['of_expressions']:,}",
            "left out" if report["left_out"] else f"trained on all the same ({SWITCH} is false)",
        )  # fmt: skip
        for split, part in count["by_split"].items():
            logging.info("  of these in %s: %s images", split, f"{part['images']:,}")
    if report["not_checked"]:
        logging.warning(
            "%s: there are no references of %s to check against; images held out there may be trained on.",
            SWITCH, ", ".join(report["not_checked"]),
        )  # fmt: skip
