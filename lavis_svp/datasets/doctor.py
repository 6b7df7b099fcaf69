"""The data doctor: which files of the RefCOCO data sets are missing, and whether the counts are the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavis_svp.common.images import BadImageError, read_image
from lavis_svp.datasets.layout import (
    COUNTS,
    IMAGE_SOURCE,
    SOURCES,
    annotation_files,
    dataset_spec,
    image_folders,
)
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.sources import ReferredImage

_SHOWN = 5
"""How many missing files are named."""


@dataclass
class Diagnosis:
    """The state of one data set in one partition.

    Args:
        dataset: its name.
        split_by: its partition.
        lines: the report.
        problems: faults to mend, one line each.
        images: image ids of each split, where the annotations could be read.
    """

    dataset: str
    split_by: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    images: dict[str, set[int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the data set in its partition."""
        return f"{self.dataset} ({self.split_by})"

    def text(self) -> str:
        """The report, the problems and their remedies."""
        head = f"{self.name}: {'NOT OK' if self.problems else 'ok'}"
        return "\n  ".join([head, *self.lines, *(f"! {problem}" for problem in self.problems)])


def diagnose(
    root: str | Path, dataset: str, split_by: str, images: str | Path | None = None, subset: bool = False
) -> Diagnosis:
    """Check one data set.

    Args:
        root: the folder that holds ``refcoco/`` ...
        dataset: a key of ``layout.SPECS``.
        split_by: one of its partitions.
        images: where the images are; None = searched below ``root``.
        subset: the data are a part of the data set, or made in its format: other counts than the published ones are
            no problem.
    """
    result = Diagnosis(dataset, split_by)
    files = annotation_files(root, dataset, split_by)
    missing = files.missing()
    for path in (files.instances, files.refs):
        result.lines.append(f"{'MISSING ' if path in missing else 'found   '} {path}")
    if missing:
        result.problems += [SOURCES[dataset], *_where_images_go(root, dataset, images)]
        return result
    try:
        source = RefCOCO(files.instances, files.refs)
        splits = {split: source.images(split) for split in source.splits()}
    except ValueError as error:
        result.problems.append(str(error))
        return result
    result.images = {split: {image.image_id for image in chosen} for split, chosen in splits.items()}
    _compare_counts(result, source, subset)
    _check_images(result, root, splits, images)
    return result


def shared_images(results: Sequence[Diagnosis]) -> list[str]:
    """Held-out images of one data set that stand in the training split of one: joint training has seen them."""
    return [
        f"{count:,} of {len(images):,} images of {held.name} {split} are in the training split of {trained.name}."
        for trained in results
        for held in results
        for split, images in held.images.items()
        if split != "train" and (count := len(images & trained.images.get("train", set())))
    ]


def _compare_counts(result: Diagnosis, source: RefCOCO, subset: bool) -> None:
    published = COUNTS.get((result.dataset, result.split_by), {})
    for split in list(published) + [split for split in source.splits() if split not in published]:
        cells = []
        for name, number in source.counts(split)._asdict().items():
            expected = getattr(published[split], name) if split in published else None
            note = "" if expected is None else " as published" if number == expected else f" (published: {expected:,})"
            cells.append(f"{number:,} {name}{note}")
            if expected not in (None, number) and not subset:
                result.problems.append(f"{split} has {number:,} {name}, published are {expected:,}: another release?")
        result.lines.append(f"{split + ':':<7} {', '.join(cells)}")


def _check_images(
    result: Diagnosis, root: str | Path, splits: dict[str, list[ReferredImage]], images: str | Path | None
) -> None:
    names = sorted({image.file_name for chosen in splits.values() for image in chosen})
    folders = list(image_folders(root, result.dataset, images))
    folder = next((folder for name in names for folder in folders if (folder / name).is_file()), None)
    if folder is None:
        result.problems.append(f"None of the {len(names):,} images was found.")
        result.problems += _where_images_go(root, result.dataset, images)
        return
    lacking = [name for name in names if not (folder / name).is_file()]
    result.lines.append(f"{len(names) - len(lacking):,} of {len(names):,} images found in {folder}")
    if lacking:
        named = ", ".join(lacking[:_SHOWN]) + (" ..." if len(lacking) > _SHOWN else "")
        result.problems.append(f"{len(lacking):,} images are missing: {named}. {_image_source(result.dataset)}")
    for chosen in splits.values():
        first = next((image for image in chosen if image.file_name not in lacking), None)
        if first is None:
            continue
        path = folder / first.file_name
        try:
            loaded = read_image(path)
        except BadImageError as error:
            result.problems.append(str(error))
            continue
        if first.size not in (loaded.stored_size, loaded.pixels.shape[:2]):
            result.problems.append(f"{path} is {loaded.stored_size} (height, width), annotated as {first.size}.")


def _where_images_go(root: str | Path, dataset: str, images: str | Path | None) -> list[str]:
    searched = "\n      ".join(str(folder) for folder in image_folders(root, dataset, images))
    return [_image_source(dataset), f"Images are searched in, first to last:\n      {searched}"]


def _image_source(dataset: str) -> str:
    return IMAGE_SOURCE if dataset_spec(dataset).images is None else SOURCES[dataset]


if __name__ == "__main__":
    import sys

    from lavis_svp.cli.data import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
