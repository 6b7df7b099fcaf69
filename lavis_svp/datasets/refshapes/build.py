"""RefShapes on disk: images, ``instances.json`` and ``refs(svp).p``; only what is missing is made again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lavis_svp.datasets import refcoco_writer
from lavis_svp.datasets.refshapes.config import (
    ANNOTATIONS_PER_IMAGE,
    GENERATOR_VERSION,
    SHAPES,
    SPLITS,
    RefShapesConfig,
)
from lavis_svp.datasets.refshapes.expressions import Expression, sample_expressions
from lavis_svp.datasets.refshapes.render import render
from lavis_svp.datasets.refshapes.scene import Scene, sample_scene

NAME = "refshapes"
DEFAULT_SIZES = {"train": 1600, "val": 60, "test": 200}

_IMAGES_PER_SPLIT = 1_000_000
_SENTENCES_PER_IMAGE = 64


_MAX_ATTEMPTS = 300
_CONTENT_STREAM = 0
_PAINT_STREAM = 1


@dataclass(frozen=True)
class ShapesImage:
    """The content of an image, decided by seed, split and index alone; ``paint`` makes the pixels.

    Args:
        split, index: name the image.
        scene: its objects.
        expressions: all kinds, in the order of the kinds.
    """

    split: str
    index: int
    scene: Scene
    expressions: tuple[Expression, ...]

    @property
    def file_name(self) -> str:
        """Name of its PNG file."""
        return f"{self.split}_{self.index:06d}.png"

    def paint(self, seed: int, config: RefShapesConfig) -> tuple[np.ndarray, str]:
        """Its pixels, (H, W, 3) uint8 RGB, and the file name of its background photo."""
        return render(self.scene, _generator(seed, self.split, self.index, _PAINT_STREAM), self.split, config)


def make_image(seed: int, split: str, index: int, config: RefShapesConfig) -> ShapesImage:
    """Draw scenes until one gives enough expressions of every kind.

    Args:
        seed: of the whole data set.
        split: "train", "val" or "test".
        index: number of the image in its split, from 0.
        config: the settings.

    Returns:
        the image; it is the same however many others are made.

    Raises:
        ValueError: an unknown split, or settings under which no scene gives enough expressions.
    """
    if split not in SPLITS:
        raise ValueError(f"RefShapes has no split '{split}'. Splits: {', '.join(SPLITS)}.")
    rng = _generator(seed, split, index, _CONTENT_STREAM)
    for _ in range(_MAX_ATTEMPTS):
        scene = sample_scene(rng, config)
        expressions = sample_expressions(scene, rng, split, config) if scene else None
        if scene and expressions:
            return ShapesImage(split, index, scene, tuple(expressions))
    raise ValueError(
        f"No scene in {_MAX_ATTEMPTS} gives {config.min_quota(split)} expressions ({split} image {index}, "
        f"seed {seed}). Ask for fewer, allow more objects, or lower the margins: {config}."
    )


def _generator(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def manifest_path(root: Path) -> Path:
    """The file that records what the data set was made from."""
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
        sizes: number of images of each split; a split that is not named is empty.
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
    source = {"generator_version": GENERATOR_VERSION, "seed": seed, "config": _json_form(dataclasses.asdict(config))}
    manifest = {**source, "sizes": wanted, "complete": True}
    folder = refcoco_writer.images_folder(root, NAME)
    stored = _read_manifest(root)
    names = {f"{split}_{index:06d}.png" for split, count in wanted.items() for index in range(count)}
    present = {path.name for path in folder.glob("*.png")}
    if stored == manifest and names == present and _annotations_exist(root):
        return root / NAME
    if {key: stored.get(key) for key in source} != source:
        _remove(folder, present)
        present = set()
    _remove(folder, present - names)
    refcoco_writer.write_json(manifest_path(root), {**manifest, "complete": False})
    _write(root, wanted, seed, config, present & names, progress)
    refcoco_writer.write_json(manifest_path(root), manifest)
    return root / NAME


def _write(
    root: Path, sizes: dict[str, int], seed: int, config: RefShapesConfig, present: set[str], progress: bool
) -> None:
    images: list[dict] = []
    annotations: list[dict] = []
    refs: list[dict] = []
    folder = refcoco_writer.images_folder(root, NAME)
    jobs = [(split, index) for split, count in sizes.items() for index in range(count)]
    for split, index in tqdm(jobs, desc="RefShapes", unit="image", disable=not progress):
        drawn = make_image(seed, split, index, config)
        if drawn.file_name not in present:
            pixels, _ = drawn.paint(seed, config)
            refcoco_writer.write_png(folder / drawn.file_name, pixels)
        image, own_annotations, own_refs = _entries(drawn, config)
        images.append(image)
        annotations += own_annotations
        refs += own_refs
    refcoco_writer.write_dataset(root, NAME, images, annotations, list(SHAPES), refs)


def _entries(drawn: ShapesImage, config: RefShapesConfig) -> tuple[dict, list[dict], list[dict]]:
    """The image entry, the annotations and the refs of an image; ids follow from split and index."""
    image_id = SPLITS.index(drawn.split) * _IMAGES_PER_SPLIT + drawn.index + 1
    image = {"id": image_id, "file_name": drawn.file_name, "width": config.side, "height": config.side}
    ann_ids = [image_id * ANNOTATIONS_PER_IMAGE + i for i in range(len(drawn.scene.objects))]
    annotations = [
        refcoco_writer.annotation(
            ann_id, image_id, SHAPES.index(item.shape) + 1, mask, (item.color, item.texture, item.size)
        )
        for ann_id, item, mask in zip(ann_ids, drawn.scene.objects, drawn.scene.masks, strict=True)
    ]
    sentences = [
        (
            one.target,
            refcoco_writer.sentence(
                image_id * _SENTENCES_PER_IMAGE + number,
                one.text,
                one.kind,
                one.subkind,
                [ann_ids[i] for i in one.candidates],
            ),
        )
        for number, one in enumerate(drawn.expressions)
    ]
    refs = refcoco_writer.refs_by_target(image, annotations, drawn.split, image_id * ANNOTATIONS_PER_IMAGE, sentences)
    return image, annotations, refs


def _checked_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    unknown = [split for split in sizes if split not in SPLITS]
    if unknown:
        raise ValueError(f"RefShapes has no split {unknown}. Splits: {', '.join(SPLITS)}.")
    checked = {split: int(sizes.get(split, 0)) for split in SPLITS}
    if any(not 0 <= count < _IMAGES_PER_SPLIT for count in checked.values()):
        raise ValueError(f"RefShapes' sizes must be from 0 to {_IMAGES_PER_SPLIT - 1}, got {checked}.")
    return checked


def _json_form(value: Any) -> Any:
    """``value`` after a round trip through JSON (tuples become lists)."""
    return json.loads(json.dumps(value))


def _read_manifest(root: Path) -> dict[str, Any]:
    try:
        stored = json.loads(manifest_path(root).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _annotations_exist(root: Path) -> bool:
    files = (refcoco_writer.instances_path(root, NAME), refcoco_writer.refs_path(root, NAME))
    return all(path.is_file() for path in files)


def _remove(folder: Path, names: set[str]) -> None:
    """Delete images that belong to other settings."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
