"""The data sets in the RefCOCO format: where their files lie, what the published ones hold, where to get them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.sources import SplitCounts


@dataclass(frozen=True)
class DatasetSpec:
    """A data set in the RefCOCO format.

    Args:
        folder: its folder below the root.
        split_by: the partitions that exist; the first is the usual one.
        refs: the stem of the references' file, "refs" or "grefs".
        images: folder of its images below the root, None = COCO train2014.
        composed: its things are drawn or rendered, so that a classifier of photographs does not know them
            (``model.visual_tokens.drawn_classes``).
    """

    folder: str
    split_by: tuple[str, ...]
    refs: str = "refs"
    images: str | None = None
    composed: bool = False


SPECS = {
    "refcoco": DatasetSpec("refcoco", ("unc", "google")),
    "refcoco+": DatasetSpec("refcoco+", ("unc",)),
    "refcocog": DatasetSpec("refcocog", ("umd", "google")),
    "grefcoco": DatasetSpec("grefcoco", ("unc",), refs="grefs"),
    "refshapes": DatasetSpec("refshapes", ("svp",), images="images/refshapes", composed=True),
    "refthings": DatasetSpec("refthings", ("svp",), images="images/refthings", composed=True),
    "photos": DatasetSpec("photos", ("svp",), images="images/photos"),
    "refphotos": DatasetSpec("refphotos", ("svp",), images="images/refphotos"),
    "trainphotos": DatasetSpec("trainphotos", ("svp",), images="images/trainphotos"),
}

PUBLIC = ("refcoco", "refcoco+", "refcocog", "grefcoco")
"""The data sets that are downloaded by hand; the others come with the plugin."""

TRAIN2014_FOLDERS = (
    "images/mscoco/images/train2014",  # REFER, LISA
    "../coco_2014/train2014",  # GLaMM: data/Refer_Segm next to data/coco_2014
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
"""Where COCO's train2014 images are searched, below the root or below the folder of ``build_info.images.storage``."""

REFS_SUFFIXES = (".p", ".json")


class MissingDataError(FileNotFoundError):
    """A file of a data set is not there; the message lists the places that were searched."""


def dataset_spec(name: str) -> DatasetSpec:
    """The spec of a data set; an UnknownNameError, which lists them, if there is none of this name."""
    if name not in SPECS:
        raise unknown_name("data set", name, SPECS)
    return SPECS[name]


@dataclass(frozen=True)
class AnnotationFiles:
    """The two annotation files of a data set, whether they exist or not."""

    instances: Path
    refs: Path

    def missing(self) -> list[Path]:
        """Those of the two that do not exist."""
        return [path for path in (self.instances, self.refs) if not path.is_file()]


def annotation_files(root: str | Path, name: str, split_by: str | None = None) -> AnnotationFiles:
    """The places of the annotations of ``name`` below ``root``.

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

    ``images`` is the user's folder, the images' own or one above it; None = below ``root``.
    """
    own = dataset_spec(name).images
    if images is not None:
        yield Path(images)
    base = Path(root if images is None else images)
    for folder in TRAIN2014_FOLDERS if own is None else (own,):
        yield base / folder


def find_images(root: str | Path, name: str, file_name: str, images: str | Path | None = None) -> Path:
    """The first possible image folder that holds ``file_name``; a MissingDataError that lists all if none does."""
    folders = list(image_folders(root, name, images))
    for folder in folders:
        if (folder / file_name).is_file():
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise MissingDataError(f"There is no folder with the images of {name}: {file_name} is in none of {looked}.")


def doctor_command(root: str | Path, name: str) -> str:
    """The command that names the missing files of a data set."""
    return f"lavis-svp data doctor --root {shlex.quote(str(root))} --dataset {name}"


COUNTS: dict[tuple[str, str], dict[str, SplitCounts]] = {
    ("refcoco", "unc"): {
        "train": SplitCounts(42404, 16994, 120624),
        "val": SplitCounts(3811, 1500, 10834),
        "testA": SplitCounts(1975, 750, 5657),
        "testB": SplitCounts(1810, 750, 5095),
    },
    ("refcoco+", "unc"): {
        "train": SplitCounts(42278, 16992, 120191),
        "val": SplitCounts(3805, 1500, 10758),
        "testA": SplitCounts(1975, 750, 5726),
        "testB": SplitCounts(1798, 750, 4889),
    },
    ("refcocog", "umd"): {
        "train": SplitCounts(42226, 21899, 80512),
        "val": SplitCounts(2573, 1300, 4896),
        "test": SplitCounts(5023, 2600, 9602),
    },
    ("refcocog", "google"): {
        "train": SplitCounts(44822, 24698, None),
        "val": SplitCounts(5000, 4650, None),
    },
    ("refcoco", "google"): {
        "train": SplitCounts(40000, 19213, None),
        "val": SplitCounts(5000, 4559, None),
        "test": SplitCounts(5000, 4527, None),
    },
    ("grefcoco", "unc"): {
        "train": SplitCounts(None, None, None),
        "val": SplitCounts(None, 1500, None),
        "testA": SplitCounts(None, 750, None),
        "testB": SplitCounts(None, 750, None),
    },
}
"""(data set, partition) -> split -> references, images, sentences; None = no published number known to us."""

_ARCHIVED = (
    "The first host (bvision at UNC) is gone. The Internet Archive's Wayback Machine keeps its {folder}.zip, "
    "captured under the timestamp {stamp}. Unpack it so that {folder}/ lies in the root."
)

SOURCES = {
    "refcoco": _ARCHIVED.format(folder="refcoco", stamp="20220413011718"),
    "refcoco+": _ARCHIVED.format(folder="refcoco+", stamp="20220413011656"),
    "refcocog": _ARCHIVED.format(folder="refcocog", stamp="20220413012904"),
    "grefcoco": (
        "Its authors share it as FudanCVL/gRefCOCO on Hugging Face. Put grefs(unc).json and instances.json into "
        "grefcoco/ in the root."
    ),
    "refshapes": "It comes with the plugin: the builder refshapes_seg makes it on first use.",
    "photos": "They come with the plugin: the builder photos_seg makes them on first use.",
    "refphotos": "They come with the plugin: the builder refphotos_seg makes them on first use.",
    "trainphotos": "They come with the plugin: the builder trainphotos_seg makes them on first use.",
}
"""How to get the annotations."""

IMAGE_SOURCE = (
    "The images are COCO's train2014 (82,783 files, 13 GB), train2014.zip from COCO's own site, cocodataset.org. "
    "Unpack it to images/mscoco/images/train2014/ in the root, or anywhere, which --images names "
    "(YAML: build_info.images.storage)."
)
