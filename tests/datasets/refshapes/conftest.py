from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lavis_svp.datasets.masks import decode_segmentation
from lavis_svp.datasets.refshapes import build_refshapes


@dataclass
class Built:
    """A data set read back from disk with json and pickle alone."""

    root: Path
    images: dict[int, dict]
    annotations: dict[int, dict]
    refs: list[dict]
    shapes: dict[int, str]

    def of_image(self, image_id: int) -> list[dict]:
        return [entry for entry in self.annotations.values() if entry["image_id"] == image_id]

    def mask(self, ann_id: int) -> np.ndarray:
        return decode_segmentation(self.annotations[ann_id]["segmentation"], (336, 336))

    def sentences(self, *splits: str) -> list[tuple[dict, dict]]:
        return [(ref, sentence) for ref in self.refs if ref["split"] in splits for sentence in ref["sentences"]]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("refshapes")
    folder = build_refshapes(root, {"train": 16, "val": 4, "test": 16}, seed=3, progress=False)
    instances = json.loads((folder / "instances.json").read_text())
    refs = pickle.loads((folder / "refs(svp).p").read_bytes())  # written by the line above
    return Built(
        root,
        {entry["id"]: entry for entry in instances["images"]},
        {entry["id"]: entry for entry in instances["annotations"]},
        refs,
        {entry["id"]: entry["name"] for entry in instances["categories"]},
    )
