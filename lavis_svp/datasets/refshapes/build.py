"""RefShapes on disk: images, ``instances.json`` and ``refs(svp).p``; only what is missing is made again."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lavis_svp.common.files import BadFileError, shown
from lavis_svp.common.options import SetupError
from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets import refcoco_writer
from lavis_svp.datasets.fields import mapping
from lavis_svp.datasets.refshapes.config import (
    ANNOTATIONS_PER_IMAGE,
    BACKGROUNDS,
    GENERATOR_VERSION,
    SHAPES,
    SPLITS,
    UNSTATED_BACKGROUNDS,
    RefShapesConfig,
)
from lavis_svp.datasets.refshapes.expressions import sample_expressions
from lavis_svp.datasets.refshapes.render import render
from lavis_svp.datasets.refshapes.scene import Scene, sample_scene

NAME = "refshapes"
DEFAULT_SIZES = {"train": 1600, "val": 60, "test": 200}

_IMAGES_PER_SPLIT = 1_000_000
_SENTENCES_PER_IMAGE = 64
_MAX_ATTEMPTS = 300
_IMAGE_NAME = re.compile(rf"({'|'.join(SPLITS)})_[0-9]{{6}}\.png")
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
    expressions: tuple[refcoco_writer.NewExpression, ...]

    @property
    def file_name(self) -> str:
        """Name of its PNG file."""
        return _file_name(self.split, self.index)

    def paint(self, seed: int, config: RefShapesConfig, backgrounds: str = "untested") -> tuple[np.ndarray, str]:
        """Its pixels, (H, W, 3) uint8 RGB, and the file name of its background photo."""
        rng = _generator(seed, self.split, self.index, _PAINT_STREAM)
        return render(self.scene, rng, self.split, config, backgrounds)


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
        SetupError: an unknown split, or settings under which no scene gives enough expressions.
    """
    if split not in SPLITS:
        raise SetupError(f"RefShapes has no split '{split}'. Splits: {', '.join(SPLITS)}.")
    rng = _generator(seed, split, index, _CONTENT_STREAM)
    for _ in range(_MAX_ATTEMPTS):
        scene = sample_scene(rng, config)
        expressions = sample_expressions(scene, rng, split, config) if scene else None
        if scene and expressions:
            return ShapesImage(split, index, scene, tuple(expressions))
    raise SetupError(
        f"No scene in {_MAX_ATTEMPTS} gives {config.min_quota(split)} expressions ({split} image {index}, "
        f"seed {seed}). Ask for fewer, allow more objects, or lower the margins: {config}."
    )


def _generator(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def split_of(image_id: int) -> str:
    """The split that an image of RefShapes belongs to."""
    return SPLITS[(image_id - 1) // _IMAGES_PER_SPLIT]


def build_refshapes(
    root: str | os.PathLike[str],
    sizes: Mapping[str, int] = DEFAULT_SIZES,
    seed: int = 0,
    config: RefShapesConfig | None = None,
    progress: bool = True,
    backgrounds: str = "untested",
) -> Path:
    """Make RefShapes in RefCOCO format, or return at once if it is there already.

    Interrupted work goes on where it stopped. Another generator version makes every image anew, other backgrounds
    every training image; other sizes keep the images that are in both. What is there and is not RefShapes of this seed
    and these settings is never touched.

    Args:
        root: data folder; ``<root>/refshapes/`` and ``<root>/images/refshapes/`` are made in it.
        sizes: number of images of each split; a split that is not named is empty.
        seed: of the whole data set, 0 or more.
        config: what images and expressions look like; None is the default.
        progress: show a progress bar.
        backgrounds: the photos behind the training images: "untested" (none of them is tested on), or "released_0_5",
            with which releases 0.1 to 0.5 drew; val and test images are the same with both.

    Returns:
        ``<root>/refshapes``.

    Raises:
        UnknownNameError: unknown backgrounds.
        SetupError: an unknown split, a size or seed below 0, or settings that no scene can meet; or RefShapes of
            another seed or other settings is there.
        BadFileError: files are there that RefShapes' manifest does not vouch for.
        FileNotFoundError: scikit-image's photos are missing.
    """
    root, config = Path(root), config or RefShapesConfig()
    counts = _checked_sizes(sizes)
    if seed < 0:
        raise SetupError(f"RefShapes' seed must be 0 or more, got {seed}.")
    if backgrounds not in BACKGROUNDS:
        raise unknown_name("backgrounds of RefShapes", backgrounds, BACKGROUNDS)
    settings = json.loads(json.dumps(asdict(config)))  # as the manifest gives them back: tuples are lists
    source = {"generator_version": GENERATOR_VERSION, "seed": seed, "config": settings}
    own = {**source, "sizes": counts, "complete": True}
    manifest = own if backgrounds == UNSTATED_BACKGROUNDS else {**own, "backgrounds": backgrounds}
    folder, manifest_file = refcoco_writer.images_folder(root, NAME), refcoco_writer.manifest_path(root, NAME)
    annotations = (refcoco_writer.instances_path(root, NAME), refcoco_writer.refs_path(root, NAME))
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    stored = refcoco_writer.own_manifest(manifest_file, own, (*annotations, *found))
    for what in ("seed", "config"):
        if stored and stored[what] != source[what]:
            raise SetupError(
                f"{root / NAME} holds RefShapes of another {what} ({shown(stored[what])} there, {shown(source[what])} "
                f"wanted), which is not drawn over. Give another root, or move it and {folder} away."
            )
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    names = {_file_name(*job) for job in jobs}
    present = {path.name for path in found if _IMAGE_NAME.fullmatch(path.name)}
    if stored == manifest and names == present and all(path.is_file() for path in annotations):
        return root / NAME
    keep = names if stored.get("generator_version") == GENERATOR_VERSION else set()
    drawn_on = stored.get("backgrounds", UNSTATED_BACKGROUNDS)
    if drawn_on != backgrounds:
        keep = {name for name in keep if not name.startswith("train_")}
    if drawn_on != backgrounds and any(name.startswith("train_") for name in present):
        logging.warning(
            "The training images of %s are drawn anew: they have the backgrounds %s, wanted are %s. The option "
            "backgrounds: %s gives back the old ones.", root / NAME, drawn_on, backgrounds, drawn_on,
        )  # fmt: skip
    for name in present - keep:
        (folder / name).unlink(missing_ok=True)
    refcoco_writer.write_json(manifest_file, {**manifest, "complete": False})
    writer = refcoco_writer.DatasetWriter(root, NAME, SHAPES, ANNOTATIONS_PER_IMAGE, _SENTENCES_PER_IMAGE)
    for split, index in tqdm(jobs, desc="RefShapes", unit="image", disable=not progress):
        drawn = make_image(seed, split, index, config)
        if drawn.file_name not in present & keep:
            refcoco_writer.write_png(folder / drawn.file_name, drawn.paint(seed, config, backgrounds)[0])
        objects = [
            (item.shape, mask, (item.color, item.texture, item.size))
            for item, mask in zip(drawn.scene.objects, drawn.scene.masks, strict=True)
        ]
        image_id = SPLITS.index(split) * _IMAGES_PER_SPLIT + index + 1
        writer.add(image_id, drawn.file_name, split, objects, drawn.expressions)
    writer.write()
    refcoco_writer.write_json(manifest_file, manifest)
    return root / NAME


def _file_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.png"


def made_sizes(root: Path) -> dict[str, int] | None:
    """The sizes of the RefShapes below a data folder; None if there is none.

    Raises:
        BadFileError: its manifest states impossible ones.
    """
    path = refcoco_writer.manifest_path(root, NAME)
    sizes = refcoco_writer.read_manifest(path).get("sizes")
    if sizes is None:
        return None
    try:
        return _checked_sizes(mapping(sizes, "sizes"))
    except ValueError as error:
        raise BadFileError(f"{path} is damaged: {error} Give another root, or move {root / NAME} away.") from error


def _checked_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    unknown = [split for split in sizes if split not in SPLITS]
    if unknown:
        raise SetupError(f"RefShapes has no split {unknown}. Splits: {', '.join(SPLITS)}.")
    checked = {split: sizes.get(split, 0) for split in SPLITS}
    if not all(type(count) is int and 0 <= count < _IMAGES_PER_SPLIT for count in checked.values()):
        raise SetupError(f"RefShapes' sizes must be from 0 to {_IMAGES_PER_SPLIT - 1}, got {shown(checked)}.")
    return checked
