"""What the published data sets hold, and where they can still be got."""

from __future__ import annotations

from lavis_svp.datasets.refcoco import SplitCounts

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
}
"""How to get the annotations."""

IMAGE_SOURCE = (
    "The images are COCO's train2014 (82,783 files, 13 GB), train2014.zip from COCO's own site, cocodataset.org. "
    "Unpack it to images/mscoco/images/train2014/ in the root, or anywhere and say so with --images "
    "(YAML: build_info.images.storage)."
)
