"""Says what is missing of the RefCOCO data sets, and counts what is there.

``python -m lavis_svp.datasets.doctor --root DIR [--dataset refcoco] [--split-by unc] [--images DIR] [--subset]``; the
exit code is 0 only if everything asked for is complete. ``--subset`` is for a part of a data set, or one made in its
format: other counts than the published ones are then shown, but are no fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavis_svp.datasets.images import BadImageError, read_image
from lavis_svp.datasets.layout import (
    PUBLIC,
    SPECS,
    MissingDataError,
    annotation_files,
    dataset_spec,
    find_images,
    image_folders,
)
from lavis_svp.datasets.published import COUNTS, IMAGE_SOURCE, SOURCES
from lavis_svp.datasets.refcoco import RefCOCO, ReferredImage

_SHOWN = 5
"""How many missing files are named."""


@dataclass
class Diagnosis:
    """What was found of one data set in one partition.

    Args:
        dataset: its name.
        split_by: its partition.
        lines: the report.
        problems: what has to be mended, one line each.
        images: image ids of each split, where the annotations could be read.
    """

    dataset: str
    split_by: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    images: dict[str, set[int]] = field(default_factory=dict)

    def text(self) -> str:
        """The report, the problems and what to do."""
        head = f"{self.dataset} ({self.split_by}): {'NOT OK' if self.problems else 'ok'}"
        return "\n  ".join([head, *self.lines, *(f"! {problem}" for problem in self.problems)])


def diagnose(
    root: str | Path, dataset: str, split_by: str, images: str | Path | None = None, subset: bool = False
) -> Diagnosis:
    """Check one data set.

    Args:
        root: the folder that holds ``refcoco/`` ...
        dataset: a key of ``layout.SPECS``.
        split_by: one of its partitions.
        images: where the images are; None = found below ``root``.
        subset: other counts than the published ones are no problem.
    """
    found = Diagnosis(dataset, split_by)
    files = annotation_files(root, dataset, split_by)
    missing = files.missing()
    for path in (files.instances, files.refs):
        found.lines.append(f"{'MISSING ' if path in missing else 'found   '} {path}")
    if missing:
        found.problems.append(SOURCES[dataset])
        found.problems += _where_images_go(root, dataset, images)
        return found
    try:
        source = RefCOCO(files.instances, files.refs)
        splits = {split: source.images(split) for split in source.splits()}
    except ValueError as error:
        found.problems.append(str(error))
        return found
    found.images = {split: {image.image_id for image in chosen} for split, chosen in splits.items()}
    _compare_counts(found, source, subset)
    _check_images(found, root, splits, images)
    return found


def _compare_counts(found: Diagnosis, source: RefCOCO, subset: bool) -> None:
    published = COUNTS.get((found.dataset, found.split_by), {})
    known = list(published) + [split for split in source.splits() if split not in published]
    for split in known:
        counted = source.counts(split)
        cells = []
        for name, number in counted._asdict().items():
            expected = getattr(published[split], name) if split in published else None
            note = "" if expected is None else " as published" if number == expected else f" (published: {expected:,})"
            cells.append(f"{number:,} {name}{note}")
            if expected not in (None, number) and not subset:
                found.problems.append(f"{split} has {number:,} {name}, published are {expected:,}: another release?")
        found.lines.append(f"{split + ':':<7} {', '.join(cells)}")


def _check_images(
    found: Diagnosis, root: str | Path, splits: dict[str, list[ReferredImage]], images: str | Path | None
) -> None:
    wanted = {image.file_name for chosen in splits.values() for image in chosen}
    try:
        folder = next(_folders_with(root, found.dataset, sorted(wanted), images))
    except StopIteration:
        found.problems.append(f"None of the {len(wanted):,} images was found.")
        found.problems += _where_images_go(root, found.dataset, images)
        return
    lacking = sorted(name for name in wanted if not (folder / name).is_file())
    found.lines.append(f"{len(wanted) - len(lacking):,} of {len(wanted):,} images found in {folder}")
    if lacking:
        named = ", ".join(lacking[:_SHOWN]) + (" ..." if len(lacking) > _SHOWN else "")
        found.problems.append(f"{len(lacking):,} images are missing: {named}. {_image_source(found.dataset)}")
    for chosen in splits.values():
        first = next((image for image in chosen if image.file_name not in lacking), None)
        if first is not None:
            found.problems += _check_one_image(folder / first.file_name, first.size)


def _folders_with(root: str | Path, dataset: str, names: Sequence[str], images: str | Path | None) -> Iterator[Path]:
    """Folders that hold at least one of the images; the first names alone decide in nearly every case."""
    for name in names:
        try:
            yield find_images(root, dataset, name, images)
        except MissingDataError:
            continue


def _check_one_image(path: Path, annotated: tuple[int, int]) -> list[str]:
    try:
        loaded = read_image(path)
    except BadImageError as error:
        return [str(error)]
    sizes = (loaded.stored_size, loaded.pixels.shape[:2])
    return [] if annotated in sizes else [f"{path} is {sizes[0]} (height, width), annotated as {annotated}."]


def _where_images_go(root: str | Path, dataset: str, images: str | Path | None) -> list[str]:
    looked = "\n      ".join(str(folder) for folder in image_folders(root, dataset, images))
    return [_image_source(dataset), f"Images are looked for in, first to last:\n      {looked}"]


def _image_source(dataset: str) -> str:
    return IMAGE_SOURCE if dataset_spec(dataset).images is None else SOURCES[dataset]


def shared_images(found: Sequence[Diagnosis]) -> list[str]:
    """Held-out images of one data set that stand in the training split of one: joint training has seen them."""
    lines = []
    for trained in found:
        for held in found:
            for split, images in held.images.items():
                count = len(images & trained.images.get("train", set())) if split != "train" else 0
                if count:
                    lines.append(
                        f"{count:,} of {len(images):,} images of {held.dataset} ({held.split_by}) {split} are in the "
                        f"training split of {trained.dataset} ({trained.split_by})."
                    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lavis_svp.datasets.doctor", description=__doc__)
    parser.add_argument("--root", required=True, type=Path, help="the folder that holds refcoco/, refcoco+/ ...")
    parser.add_argument("--dataset", choices=list(SPECS), action="append", help="default: the four public ones")
    parser.add_argument("--split-by", help="partition, e.g. unc, umd, google; default: the usual one")
    parser.add_argument("--images", type=Path, help="the images' folder or one above it; default: below the root")
    parser.add_argument("--subset", action="store_true", help="counts need not be the published ones")
    given = parser.parse_args(arguments)
    names = given.dataset or list(PUBLIC)
    for name in names:
        if given.split_by and given.split_by not in SPECS[name].split_by:
            parser.error(f"--split-by {given.split_by}: {name} has {', '.join(SPECS[name].split_by)}")
    found = [
        diagnose(given.root, name, given.split_by or SPECS[name].split_by[0], given.images, given.subset)
        for name in names
    ]
    print("\n\n".join(diagnosis.text() for diagnosis in found))
    shared = shared_images(found)
    if shared:
        print("\nFor training on several of them, or against leaks:\n  " + "\n  ".join(shared))
    return int(any(diagnosis.problems for diagnosis in found))


if __name__ == "__main__":
    sys.exit(main())
