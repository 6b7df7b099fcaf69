"""Conversion: any source of images with expressions into shards; an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset import TarWriter

from lavis_svp.common.files import (
    BadFileError,
    BrokenFileError,
    file_errors,
    is_outside,
    one_line,
    open_regular,
    parse_json,
    read_checked_json,
    read_regular,
    write_checked_json,
)
from lavis_svp.common.images import MAX_IMAGE_PIXELS, BadImageError, decode_image, file_bytes
from lavis_svp.common.options import SetupError
from lavis_svp.common.paths import write_whole
from lavis_svp.common.tensor_files import parse_tensors
from lavis_svp.datasets.shards.format import (
    FEATURES,
    IMAGES_PER_SHARD,
    INDEX,
    RECORD,
    SUPERPIXELS,
    UNFINISHED,
    Sample,
    ShardIndex,
    image_extension,
    image_of,
    image_record,
    instance_records,
    read_index,
    sample_key,
    sha256_of,
    shard_name,
    to_bytes,
)
from lavis_svp.datasets.sources import AnnotationSource, ImageFolder, ImageStore, ReferredImage
from lavis_svp.datasets.targets import Placement, target_masks
from lavis_svp.superpixels.region_map import to_png
from lavis_svp.superpixels.store import SHARD_INDEX, SuperpixelShards, SuperpixelStore, open_store

_MEND = "Convert into an empty folder."
_ROUNDING = 1.5
"""Cells by which a side of a region map may be off: it is rounded, at a resolution that was rounded."""


@dataclass
class Conversion:
    """What to convert.

    Args:
        source: the annotations.
        images: the image files.
        identity: names the source and sums up its files, JSON-able: shards of another source are never mixed in.
        splits: names; None = all.
        images_per_shard: at most so many in each shard; a shard holds images of one split.
        extras: what else goes into each sample.
        skip_broken: leave out an image whose files are broken, and name it in the index; False = stop.
        follow_links: pack files to which links lead out of the images' folder; False = such an image is broken.
        max_image_pixels: height times width of the largest image that is read; a larger one is broken.
    """

    source: AnnotationSource
    images: ImageStore
    identity: Mapping[str, Any]
    splits: Sequence[str] | None = None
    images_per_shard: int = IMAGES_PER_SHARD
    extras: Sequence[SuperpixelExtra | FeatureExtra] = ()
    skip_broken: bool = False
    follow_links: bool = False
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            raise ValueError(f"images_per_shard must be at least 1, got {self.images_per_shard}.")
        if self.splits and len(set(self.splits)) < len(self.splits):
            raise ValueError(f"A split is named twice: {', '.join(self.splits)}.")

    def settings(self) -> dict[str, Any]:
        """All that the shards' content depends on."""
        extras = {extra.kind: dict(extra.settings) for extra in self.extras}
        settings = {
            "source": dict(self.identity),
            "splits": list(self.splits or self.source.splits()),
            "pictures_per_shard": self.images_per_shard,
            "superpixels": extras.get("superpixels"),
            "features": extras.get("features"),
        }
        return json.loads(json.dumps(settings))  # as the index gives them back

    def shards(self) -> Iterator[tuple[str, list[ReferredImage]]]:
        """(file name, images) of each shard."""
        for split in self.splits or self.source.splits():
            images = self.source.images(split)
            for number, start in enumerate(range(0, len(images), self.images_per_shard)):
                yield shard_name(split, number), images[start : start + self.images_per_shard]


def convert(plan: Conversion, folder: str | Path, progress: bool = True) -> ShardIndex:
    """Write shards, the index last. Whole shards of an earlier conversion are kept; damaged ones are written again.

    Args:
        plan: the source and the options.
        folder: of the shards; new, empty, or from an earlier conversion with the same settings.
        progress: show a progress bar.

    Returns:
        The index; ``left_out`` names the images that were skipped.

    Raises:
        BadFileError: the folder holds other files; or, without ``skip_broken``, an image or mask cannot be read.
        SetupError: the folder holds shards of other settings; or a store of superpixels or features lacks an image, or
            what it holds of one is damaged.
    """
    folder = Path(folder)
    settings = plan.settings()
    sums = _claim(folder, settings)
    index = ShardIndex(settings)
    shards = list(plan.shards())
    total = sum(len(images) for _, images in shards)
    with tqdm(total=total, desc=f"shards ({folder.name})", unit="image", disable=not progress) as bar:
        for name, images in shards:
            path = folder / name
            samples = _finished(path, images, sums.get(name))
            if samples is None:
                index.left_out += _write_shard(plan, path, images, bar)
                samples = scan(path)
                sums[name] = file_sum(path)
                write_checked_json(folder / UNFINISHED, {"settings": settings, "sums": sums})
            else:
                bar.update(len(images))
            if samples:
                index.samples += samples
                index.shards[name] = {"bytes": path.stat().st_size, "sha256": sums[name]}
            else:
                path.unlink()  # none of its images could be read
    index.write(folder)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return index


def file_sum(path: Path) -> str:
    """sha256 of a file; errors are those of :func:`lavis_svp.common.files.open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan(path: Path) -> list[Sample]:
    """Read a whole shard: its samples with the places and sums of their members; a BadFileError if it is damaged."""
    members: dict[str, dict[str, list[int]]] = {}
    records: dict[str, dict[str, Any]] = {}
    size = path.stat().st_size
    with file_errors(path), tarfile.open(path, "r:") as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            file = archive.extractfile(member)
            # a sparse member, or one that is cut off, states any size, and memory is taken first
            if file is None or member.issparse() or member.offset_data + member.size > size:
                raise ValueError(f"{member.name} is no file, or is cut off")
            content = file.read()
            members.setdefault(key, {})[extension] = [member.offset_data, member.size, zlib.crc32(content)]
            if extension == RECORD:
                records[key] = parse_json(content, f"{member.name} in {path}")
        samples = []
        for key, places in members.items():
            record, where = records[key], f"{key}.{RECORD} in {path}"
            image, image_key = image_of(record, where), sha256_of(record, "image_key", where)
            samples.append(Sample(key, path.name, places, image, image_key))
        return samples


def _claim(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Make sure that the folder is this conversion's, mark it so, and return the sha256 of each finished shard."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / UNFINISHED
    stored, sums = settings, {}
    if unfinished.is_file():
        content = read_checked_json(unfinished, _MEND)
        with file_errors(unfinished, _MEND):
            stored, sums = dict(content["settings"]), dict(content["sums"])
    elif (folder / INDEX).is_file():
        before = read_index(folder)
        stored, sums = before.settings, {name: shard["sha256"] for name, shard in before.shards.items()}
    elif any(folder.glob("*.tar")):
        raise BadFileError(f"{folder} holds tar files of unknown origin. {_MEND}")
    if stored != settings:
        differences = [
            f"{name}: {str(stored.get(name))[:200]} in the folder, {str(settings.get(name))[:200]} wanted"
            for name in sorted({*stored, *settings})
            if stored.get(name) != settings.get(name)
        ]
        raise SetupError(f"{folder} holds shards made with other settings ({'; '.join(differences)}). {_MEND}")
    for name in ("*.tar", INDEX, UNFINISHED):
        for left in folder.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)  # of a conversion that was killed
    write_checked_json(unfinished, {"settings": settings, "sums": sums})
    return sums


def _finished(path: Path, images: Sequence[ReferredImage], known: str | None) -> list[Sample] | None:
    """The samples of a shard that needs no writing; None if it does: it is absent, changed, or lacks an image."""
    if known is None or not path.is_file() or file_sum(path) != known:
        return None
    try:
        samples = scan(path)
    except BadFileError:
        return None
    whole = {sample.key for sample in samples} == {sample_key(one.split, one.image_id) for one in images}
    return samples if whole else None


def _write_shard(plan: Conversion, path: Path, images: Sequence[ReferredImage], bar: tqdm) -> list[dict[str, Any]]:
    """Write one shard; return the images that had to be left out."""
    left_out = []
    with write_whole(path) as draft:
        # the same images give the same bytes: no times, no owner
        with open(draft, "wb") as file, TarWriter(file, mtime=0, user="", group="", encoder=False) as writer:
            for image in images:
                try:
                    writer.write({"__key__": sample_key(image.split, image.image_id), **_members(plan, image)})
                except BrokenFileError as error:
                    if not plan.skip_broken:
                        raise
                    place = {"image_id": image.image_id, "split": image.split, "file_name": image.file_name}
                    left_out.append({**place, "reason": f"{type(error).__name__}: {error}"})
                bar.update()
        with open(draft, "rb") as written:
            os.fsync(written.fileno())  # or a power cut leaves a whole name with half the content
    return left_out


def _members(plan: Conversion, image: ReferredImage) -> dict[str, bytes]:
    """Extension -> bytes of one sample, everything checked."""
    file = plan.images.file(image)
    if isinstance(plan.images, ImageFolder) and not plan.follow_links:
        path = plan.images.folder / image.file_name
        if is_outside(path, plan.images.folder):
            raise BadImageError(
                f"{path} leads out of its folder, to {os.path.realpath(path)}, so it is not packed. Put the image "
                "itself there, or convert with --follow-links."
            )
    content = file_bytes(file, plan.max_image_pixels)
    loaded = decode_image(content, str(file), plan.max_image_pixels)
    placement = Placement(image, loaded, False, file)  # the masks fit
    target_masks(plan.source, placement, [one for one in image.expressions if one.targets])  # all there, none empty
    instances = plan.source.instances(image)
    masks = [plan.source.mask(image, one) for one in instances]
    record = image_record(image, loaded.key) | {"instances": instance_records(instances, masks)}
    size = (loaded.pixels.shape[0], loaded.pixels.shape[1])
    extras = {extra.extension: extra.content(loaded.key, size, str(file)) for extra in plan.extras}
    return {image_extension(image.file_name): content, RECORD: to_bytes(record), **extras}


class SuperpixelExtra:
    """Superpixels from a store, or from shards packed from one.

    Args:
        folder: ``<store>/<generator>-<digest>``, or what ``lavis-svp superpixels shards`` wrote.

    Raises:
        FileNotFoundError, BadFileError: the folder is neither, or damaged.
    """

    kind = "superpixels"
    extension = SUPERPIXELS

    def __init__(self, folder: str | Path) -> None:
        packed = (Path(folder) / SHARD_INDEX).is_file()
        self.store: SuperpixelStore | SuperpixelShards = SuperpixelShards(folder) if packed else open_store(folder)
        self.settings = self.store.settings

    def content(self, image_key: str, size: tuple[int, int], name: str) -> bytes:
        """The superpixels of an image, as bytes.

        Args:
            image_key: sha256 of the image's file.
            size: (H, W) of the upright image.
            name: of the image, for messages.

        Raises:
            SetupError: the store lacks this image, they are damaged, or another image's; says how to fill it.
        """
        try:
            regions = self.store.get(image_key)
        except (FileNotFoundError, BadFileError) as error:
            raise SetupError(
                f"{self.store.folder} has no readable superpixels of {name} (key {image_key}; {one_line(error)}). "
                f"Fill it: lavis-svp superpixels make IMAGES --store {self.store.folder.parent}, with the options that "
                "it was made with."
            ) from error
        check_shape(regions.size, size, name)
        return to_png(regions)


def check_shape(regions: tuple[int, int], image: tuple[int, int], name: str) -> None:
    """Refuse superpixels of another shape than their image's; their resolution may differ.

    Args:
        regions: (H', W') of the region map.
        image: (H, W) of the upright image.
        name: of the image, for the message.

    Raises:
        SetupError: the proportions differ by more than the rounding of both sides up to whole cells.
    """
    if abs(regions[0] * image[1] - regions[1] * image[0]) > _ROUNDING * max(image):
        raise SetupError(
            f"The superpixels of {name} are {regions}, the image is {image} (height, width): another image's, or "
            "of another orientation. Make them again."
        )


class FeatureExtra:
    """Outputs of the frozen encoders from the cache of a model with ``cache_features``.

    Args:
        folder: ``features/<digest>`` in the plugin's cache folder.

    Raises:
        FileNotFoundError, BadFileError: the folder is no such cache, or damaged.
    """

    kind = "features"
    extension = FEATURES

    def __init__(self, folder: str | Path) -> None:
        from lavis_svp.vision.feature_cache import open_features  # slow to import: only this option needs it

        self.cache = open_features(folder)
        self.settings = self.cache.settings

    def content(self, image_key: str, size: tuple[int, int], name: str) -> bytes:
        """The features of an image, as bytes; see :meth:`SuperpixelExtra.content`."""
        path = self.cache.path(image_key)
        try:
            content = read_regular(path)
            parse_tensors(content, path)  # a damaged file is found now
        except (FileNotFoundError, BadFileError) as error:
            raise SetupError(
                f"{self.cache.folder} has no readable features of {name} (key {image_key}; {one_line(error)}). Fill it "
                "by training or evaluating on these images with a model that has cache_features: true."
            ) from error
        return content
