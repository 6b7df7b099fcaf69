"""Make RefShapes on disk: images, ``instances.json`` and ``refs(svp).p``, again only where something is missing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_svp.datasets.refshapes import refcoco_format
from lavis_svp.datasets.refshapes.config import (
    ANNOTATIONS_PER_IMAGE,
    GENERATOR_VERSION,
    SHAPES,
    SPLITS,
    RefShapesConfig,
)
from lavis_svp.datasets.refshapes.image import ShapesImage, make_image

NAME = "refshapes"
DEFAULT_SIZES = {"train": 1600, "val": 60, "test": 200}

_IMAGES_PER_SPLIT = 1_000_000
_SENTENCES_PER_IMAGE = 64


def manifest_path(root: Path) -> Path:
    """Where it is written what the data set was made from."""
    return root / NAME / "manifest.json"


def split_of(image_id: int) -> str:
    """The split that an image of RefShapes belongs to."""
    return SPLITS[(image_id - 1) // _IMAGES_PER_SPLIT]


def build_refshapes(
    root: str | os.PathLike[str],
    sizes: Mapping[str, int] = DEFAULT_SIZES,
    seed: int = 0,
    config: RefShapesConfig | None = None,
    progress: bool = True,
) -> Path:
    """Make RefShapes in RefCOCO format, or return at once if it is there already.

    Interrupted work goes on where it stopped. Another seed, generator version or setting makes every
    image anew; other sizes keep the images that are in both.

    Args:
        root: data folder; ``<root>/refshapes/`` and ``<root>/images/refshapes/`` are made in it.
        sizes: number of images of each split; a split that is not named gets none.
        seed: of the whole data set, 0 or more.
        config: what images and expressions look like; None is the default.
        progress: show a progress bar.

    Returns:
        ``<root>/refshapes``.

    Raises:
        ValueError: an unknown split, a size or seed below 0, or settings that no scene can meet.
        FileNotFoundError: scikit-image's photos are missing.
    """
    root = Path(root)
    config = config or RefShapesConfig()
    wanted = _checked_sizes(sizes)
    if seed < 0:
        raise ValueError(f"RefShapes' seed must be 0 or more, got {seed}.")
    source = {"generator_version": GENERATOR_VERSION, "seed": seed, "config": _plain(dataclasses.asdict(config))}
    manifest = {**source, "sizes": wanted, "complete": True}
    folder = refcoco_format.images_folder(root, NAME)
    found = _read_manifest(root)
    names = {f"{split}_{index:06d}.png" for split, count in wanted.items() for index in range(count)}
    present = {path.name for path in folder.glob("*.png")}
    if found == manifest and names == present and _annotations_exist(root):
        return root / NAME
    if {key: found.get(key) for key in source} != source:
        present = _remove(folder, present)
    _remove(folder, present - names)
    refcoco_format.write_json(manifest_path(root), {**manifest, "complete": False})
    _write(root, wanted, seed, config, present & names, progress)
    refcoco_format.write_json(manifest_path(root), manifest)
    return root / NAME


def _write(
    root: Path, sizes: dict[str, int], seed: int, config: RefShapesConfig, present: set[str], progress: bool
) -> None:
    images: list[dict] = []
    annotations: list[dict] = []
    refs: list[dict] = []
    folder = refcoco_format.images_folder(root, NAME)
    jobs = [(split, index) for split, count in sizes.items() for index in range(count)]
    for split, index in tqdm(jobs, desc="RefShapes", unit="image", disable=not progress):
        drawn = make_image(seed, split, index, config)
        if drawn.file_name not in present:
            pixels, _ = drawn.paint(seed, config)
            refcoco_format.write_png(folder / drawn.file_name, pixels)
        image, own_annotations, own_refs = _entries(drawn, config)
        images.append(image)
        annotations += own_annotations
        refs += own_refs
    refcoco_format.write_dataset(root, NAME, images, annotations, list(SHAPES), refs)


def _entries(drawn: ShapesImage, config: RefShapesConfig) -> tuple[dict, list[dict], list[dict]]:
    """The image entry, the annotations and the refs of an image; ids follow from split and index."""
    image_id = SPLITS.index(drawn.split) * _IMAGES_PER_SPLIT + drawn.index + 1
    image = {"id": image_id, "file_name": drawn.file_name, "width": config.side, "height": config.side}
    ann_ids = [image_id * ANNOTATIONS_PER_IMAGE + i for i in range(len(drawn.scene.objects))]
    annotations = [
        refcoco_format.annotation(
            ann_id, image_id, SHAPES.index(item.shape) + 1, mask, (item.color, item.texture, item.size)
        )
        for ann_id, item, mask in zip(ann_ids, drawn.scene.objects, drawn.scene.masks, strict=True)
    ]
    said: dict[int | None, list[dict]] = {}
    for number, expression in enumerate(drawn.expressions):
        candidates = [ann_ids[i] for i in expression.candidates]
        sent_id = image_id * _SENTENCES_PER_IMAGE + number
        entry = refcoco_format.sentence(sent_id, expression.text, expression.kind, expression.subkind, candidates)
        said.setdefault(expression.target, []).append(entry)
    refs = []
    for target, sentences in said.items():
        # One place after the objects' own is left for "no target".
        place = len(ann_ids) if target is None else target
        refs.append(
            refcoco_format.ref(
                image_id * ANNOTATIONS_PER_IMAGE + place,
                None if target is None else annotations[target],
                image,
                drawn.split,
                sentences,
            )
        )
    return image, annotations, refs


def _checked_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    unknown = [split for split in sizes if split not in SPLITS]
    if unknown:
        raise ValueError(f"RefShapes has no split {unknown}. Splits: {', '.join(SPLITS)}.")
    checked = {split: int(sizes.get(split, 0)) for split in SPLITS}
    if any(not 0 <= count < _IMAGES_PER_SPLIT for count in checked.values()):
        raise ValueError(f"RefShapes' sizes must be from 0 to {_IMAGES_PER_SPLIT - 1}, got {checked}.")
    return checked


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back (tuples become lists)."""
    return json.loads(json.dumps(value))


def _read_manifest(root: Path) -> dict[str, Any]:
    try:
        found = json.loads(manifest_path(root).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _annotations_exist(root: Path) -> bool:
    files = (refcoco_format.instances_path(root, NAME), refcoco_format.refs_path(root, NAME))
    return all(path.is_file() for path in files)


def _remove(folder: Path, names: set[str]) -> set[str]:
    """Delete images that belong to other settings; returns the empty set: nothing of them is left."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return set()
