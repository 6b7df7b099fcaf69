"""RefThings on disk: images, ``instances.json`` and ``refs(svp).p``; only what is missing is made again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from lavis_svp.common.files import BadFileError, shown
from lavis_svp.common.options import SetupError
from lavis_svp.common.paths import write_file
from lavis_svp.datasets import refcoco_writer
from lavis_svp.datasets.fields import mapping
from lavis_svp.datasets.refthings.colors import COLORS
from lavis_svp.datasets.refthings.config import (
    ANNOTATIONS_PER_IMAGE,
    GENERATOR_VERSION,
    SPLITS,
    RefThingsConfig,
)
from lavis_svp.datasets.refthings.expressions import sample_expressions
from lavis_svp.datasets.refthings.render import paint
from lavis_svp.datasets.refthings.scene import Composition, sample_composition
from lavis_svp.datasets.refthings.sources import Materials, load_materials, materials_key

NAME = "refthings"
DEFAULT_SIZES = {"train": 3000, "val": 100, "test": 200}

_IMAGES_PER_SPLIT = 1_000_000
_SENTENCES_PER_IMAGE = 64
_MAX_ATTEMPTS = 300
_IMAGE_NAME = re.compile(rf"({'|'.join(SPLITS)})_[0-9]{{6}}\.jpg")
_CONTENT_STREAM = 0
_PAINT_STREAM = 1


@dataclass(frozen=True, eq=False)
class ThingsImage:
    """The content of an image, decided by seed, split, index and materials alone; ``jpeg`` makes the file.

    Args:
        split, index: name the image.
        composition: its things and its background.
        expressions: all kinds, in the order of the kinds.
    """

    split: str
    index: int
    composition: Composition
    expressions: tuple[refcoco_writer.NewExpression, ...]

    @property
    def file_name(self) -> str:
        """Name of its JPEG file."""
        return _file_name(self.split, self.index)

    def paint(self, seed: int) -> tuple[np.ndarray, int]:
        """Its pixels, (H, W, 3) uint8 RGB, and the JPEG quality to store them with."""
        return paint(self.composition, _generator(seed, self.split, self.index, _PAINT_STREAM))

    def jpeg(self, seed: int) -> bytes:
        """Its file."""
        pixels, quality = self.paint(seed)
        done, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if not done:
            raise ValueError(f"Cannot encode {self.file_name}, of shape {pixels.shape}, as JPEG.")
        return encoded.tobytes()

    def objects(self) -> list[tuple[str, np.ndarray, list[str]]]:
        """Name, mask (H, W) and words of each thing, as the writer takes them."""
        scene, found = self.composition.scene, []
        for thing, mask, verdicts in zip(scene.things, scene.masks, scene.colors, strict=True):
            colors = [color for color, verdict in zip(COLORS, verdicts, strict=True) if verdict == 1]
            found.append((thing.name, mask, [*thing.synonyms, *thing.hypernyms, *colors]))
        return found


def make_image(seed: int, split: str, index: int, materials: Materials, config: RefThingsConfig) -> ThingsImage:
    """Draw scenes until one gives enough expressions.

    Args:
        seed: of the whole data set.
        split: "train", "val" or "test".
        index: number of the image in its split, from 0.
        materials: what it is composed of.
        config: the settings.

    Returns:
        the image; it is the same however many others are made.

    Raises:
        SetupError: an unknown split, or settings under which no scene gives enough expressions.
    """
    if split not in SPLITS:
        raise SetupError(f"RefThings has no split '{split}'. Splits: {', '.join(SPLITS)}.")
    rng = _generator(seed, split, index, _CONTENT_STREAM)
    for _ in range(_MAX_ATTEMPTS):
        composition = sample_composition(rng, split, materials, config)
        if composition is None:
            continue
        found = sample_expressions(composition.scene, rng, split, materials.table, config)
        if found:
            return ThingsImage(split, index, composition, tuple(expression for expression, _ in found))
    raise SetupError(
        f"No scene in {_MAX_ATTEMPTS} gives {config.min_expressions} expressions ({split} image {index}, seed {seed}). "
        f"Ask for fewer, allow smaller things, lower the margins, or give more cut-outs for this split: {config}."
    )


def _generator(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def build_refthings(
    root: str | os.PathLike[str],
    sizes: Mapping[str, int] = DEFAULT_SIZES,
    seed: int = 0,
    config: RefThingsConfig | None = None,
    progress: bool = True,
    materials: Materials | None = None,
) -> Path:
    """Make RefThings in RefCOCO format, or return at once if it is there already.

    Interrupted work goes on where it stopped. Another generator version, or another table of cut-outs or backgrounds,
    makes every image anew; other sizes keep the images that are in both. What is there and is not RefThings of this
    seed and these settings is never touched.

    Args:
        root: data folder; ``<root>/refthings/`` and ``<root>/images/refthings/`` are made in it.
        sizes: number of images of each split; a split that is not named is empty.
        seed: of the whole data set, 0 or more.
        config: what images and expressions look like; None is the default.
        progress: show downloads and a progress bar.
        materials: cut-outs and backgrounds; None fetches those that ``config`` names.

    Returns:
        ``<root>/refthings``.

    Raises:
        SetupError: an unknown split, a size or seed below 0, or settings that no scene can meet; or RefThings of
            another seed or other settings is there.
        BadFileError: files are there that RefThings' manifest does not vouch for; a table is wrong.
        DownloadError, HashMismatchError: a package cannot be had, or is not the pinned one.
    """
    root, config = Path(root), config or RefThingsConfig()
    counts = _checked_sizes(sizes)
    if seed < 0:
        raise SetupError(f"RefThings' seed must be 0 or more, got {seed}.")
    settings = json.loads(json.dumps(asdict(config)))  # as the manifest gives them back: tuples are lists
    key = materials_key(config.cutouts) if materials is None else materials.key
    source = {"generator_version": GENERATOR_VERSION, "seed": seed, "config": settings, "materials": key}
    manifest = {**source, "sizes": counts, "complete": True}
    folder, manifest_file = refcoco_writer.images_folder(root, NAME), refcoco_writer.manifest_path(root, NAME)
    annotations = (refcoco_writer.instances_path(root, NAME), refcoco_writer.refs_path(root, NAME))
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    stored = refcoco_writer.own_manifest(manifest_file, manifest, (*annotations, *found))
    for what in ("seed", "config"):
        if stored and stored[what] != source[what]:
            raise SetupError(
                f"{root / NAME} holds RefThings of another {what} ({shown(stored[what])} there, {shown(source[what])} "
                f"wanted), which is not written over. Give another root, or move it and {folder} away."
            )
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    names = {_file_name(*job) for job in jobs}
    present = {path.name for path in found if _IMAGE_NAME.fullmatch(path.name)}
    if stored == manifest and names == present and all(path.is_file() for path in annotations):
        return root / NAME
    if materials is None:
        wanted = [split for split, count in counts.items() if count]
        materials = load_materials(config.cutouts, wanted, progress=progress)
    same = all(stored.get(what) == source[what] for what in ("generator_version", "materials"))
    keep = names if same else set()
    for name in present - keep:
        (folder / name).unlink(missing_ok=True)
    refcoco_writer.write_json(manifest_file, {**manifest, "complete": False})
    categories = materials.table.categories
    writer = refcoco_writer.DatasetWriter(root, NAME, categories, ANNOTATIONS_PER_IMAGE, _SENTENCES_PER_IMAGE)
    for split, index in tqdm(jobs, desc="RefThings", unit="image", disable=not progress):
        image = make_image(seed, split, index, materials, config)
        if image.file_name not in present & keep:
            write_file(folder / image.file_name, image.jpeg(seed))
        image_id = SPLITS.index(split) * _IMAGES_PER_SPLIT + index + 1
        writer.add(image_id, image.file_name, split, image.objects(), image.expressions)
    writer.write()
    refcoco_writer.write_json(manifest_file, manifest)
    return root / NAME


def _file_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.jpg"


def made_sizes(root: Path) -> dict[str, int] | None:
    """The sizes of the RefThings below a data folder; None if there is none.

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
        raise SetupError(f"RefThings has no split {unknown}. Splits: {', '.join(SPLITS)}.")
    checked = {split: sizes.get(split, 0) for split in SPLITS}
    if not all(type(count) is int and 0 <= count < _IMAGES_PER_SPLIT for count in checked.values()):
        raise SetupError(f"RefThings' sizes must be from 0 to {_IMAGES_PER_SPLIT - 1}, got {shown(checked)}.")
    return checked
