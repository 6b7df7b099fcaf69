"""Where the files of each RefCOCO-format data set lie below its root."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lavis_svp.common.registry import unknown_name


@dataclass(frozen=True)
class DatasetSpec:
    """A data set in the RefCOCO format.

    Args:
        folder: its folder below the root.
        split_by: the partitions that exist; the first is the usual one.
        refs: the stem of the references' file, "refs" or "grefs".
        images: folder of its images below the root, None = COCO train2014.
    """

    folder: str
    split_by: tuple[str, ...]
    refs: str = "refs"
    images: str | None = None


SPECS = {
    "refcoco": DatasetSpec("refcoco", ("unc", "google")),
    "refcoco+": DatasetSpec("refcoco+", ("unc",)),
    "refcocog": DatasetSpec("refcocog", ("umd", "google")),
    "grefcoco": DatasetSpec("grefcoco", ("unc",), refs="grefs"),
    "refshapes": DatasetSpec("refshapes", ("svp",), images="images/refshapes"),
    "photos": DatasetSpec("photos", ("svp",), images="images/photos"),
}

PUBLIC = ("refcoco", "refcoco+", "refcocog", "grefcoco")
"""Those that are downloaded by hand; the others come with the plugin."""

TRAIN2014_FOLDERS = (
    "images/mscoco/images/train2014",  # REFER, LISA
    "../coco_2014/train2014",  # GLaMM: data/Refer_Segm beside data/coco_2014
    "coco_2014/train2014",
    "images/train2014",  # gRefCOCO
    "images/mscoco/train2014",
    "mscoco/train2014",
    "coco/train2014",
    "../coco/train2014",
    "../coco/images/train2014",
    "train2014",
    "../train2014",
    "images",
    ".",
)
"""Where COCO's train2014 images are looked for, below the root or below the folder that was given for images."""

REFS_SUFFIXES = (".p", ".json")


class MissingDataError(FileNotFoundError):
    """A file of a data set is not there; the message says where it was looked for."""


def dataset_spec(name: str) -> DatasetSpec:
    """Return the spec of the data set ``name``.

    Raises:
        UnknownNameError: no such data set; the message lists them.
    """
    if name not in SPECS:
        raise unknown_name("data set", name, SPECS)
    return SPECS[name]


@dataclass(frozen=True)
class Origin:
    """Which data set something was read from.

    Args:
        root: the folder that holds ``refcoco/``, ``refcoco+/`` ...
        dataset: a key of ``SPECS``; None = none of these.
        split_by: its partition; None = the usual one.
    """

    root: Path
    dataset: str | None
    split_by: str | None = None


@dataclass(frozen=True)
class AnnotationFiles:
    """The two annotation files of a data set, whether they exist or not."""

    instances: Path
    refs: Path

    def missing(self) -> list[Path]:
        """Those of the two that do not exist."""
        return [path for path in (self.instances, self.refs) if not path.is_file()]


def annotation_files(root: str | Path, name: str, split_by: str | None = None) -> AnnotationFiles:
    """Where the annotations of ``name`` lie below ``root``.

    Args:
        root: the folder that holds ``refcoco/``, ``refcoco+/`` ...
        name: a key of ``SPECS``.
        split_by: "unc", "umd", "google" ...; None = the data set's usual one.

    Raises:
        UnknownNameError: the data set or the partition does not exist.
    """
    spec = dataset_spec(name)
    partition = split_by or spec.split_by[0]
    if partition not in spec.split_by:
        raise unknown_name(f"partition (split_by) of {name}", partition, spec.split_by)
    folder = Path(root) / spec.folder
    choices = [folder / f"{spec.refs}({partition}){suffix}" for suffix in REFS_SUFFIXES]
    usual = choices[1] if spec.refs == "grefs" else choices[0]  # gRefCOCO is published as JSON
    refs = next((path for path in choices if path.is_file()), usual)
    return AnnotationFiles(folder / "instances.json", refs)


def image_folders(root: str | Path, name: str, images: str | Path | None = None) -> Iterator[Path]:
    """The folders in which the images of ``name`` may lie, likeliest first.

    Args:
        root: as for :func:`annotation_files`.
        name: a key of ``SPECS``.
        images: a folder given by the user, the images' own or one above it; None = below ``root``.
    """
    own = dataset_spec(name).images
    if images is not None:
        yield Path(images)
    base = Path(root if images is None else images)
    for folder in TRAIN2014_FOLDERS if own is None else (own,):
        yield base / folder


def find_images(root: str | Path, name: str, file_name: str, images: str | Path | None = None) -> Path:
    """The first possible image folder that holds ``file_name``.

    Raises:
        MissingDataError: none does; the message lists where it was looked for.
    """
    folders = list(image_folders(root, name, images))
    for folder in folders:
        if (folder / file_name).is_file():
            return folder
    looked = "\n  ".join(str(folder) for folder in folders)
    raise MissingDataError(f"No folder with the images of {name}: {file_name} is in none of\n  {looked}")


def doctor_command(root: str | Path, name: str) -> str:
    """The command that tells what is missing of a data set."""
    return f"python -m lavis_svp.datasets.doctor --root {shlex.quote(str(root))} --dataset {name}"
