"""The superpixels of a data set in webdataset shards: few large files, streamed in order or read by key.

A folder holds ``superpixels-000000.tar`` and so on, each sample ``<key>.superpixels.png`` (see :mod:`.png`), and
``index.json``: the settings that made them, weights' digest included, and where in which shard each key lies. Any
webdataset reader streams them; :class:`SuperpixelShards` reads single ones.
"""

from __future__ import annotations

import json
import os
import tarfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset import TarWriter

from lavis_svp.superpixels.cache import SuperpixelCache, check_settings
from lavis_svp.superpixels.png import from_png
from lavis_svp.superpixels.region_map import RegionMap

EXTENSION = "superpixels.png"
INDEX = "index.json"
FORMAT = 1


def write_shards(
    cache: SuperpixelCache, folder: str | Path, images_per_shard: int = 10_000, progress: bool = True
) -> int:
    """Pack everything a cache holds; what is in ``folder`` already is replaced, the index last.

    Args:
        cache: the store to pack.
        folder: of the shards.
        images_per_shard: at most so many in each.
        progress: show a progress bar.

    Returns:
        How many images were packed.

    Raises:
        ValueError: the cache is empty, or one of its files damaged.
    """
    keys, folder = cache.keys(), Path(folder)
    if not keys:
        raise ValueError(f"{cache.folder} holds no superpixels: fill it first.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # never an index of other shards than those that are here
    for old in folder.glob("superpixels-*.tar"):
        old.unlink()
    places: dict[str, list[int]] = {}
    with tqdm(total=len(keys), desc=f"shards ({folder.name})", disable=not progress) as bar:
        for number, start in enumerate(range(0, len(keys), images_per_shard)):
            path = folder / _shard_name(number)
            # the same images give the same bytes: no times, no owner
            with TarWriter(str(path), mtime=0, user="", group="") as writer:
                for key in keys[start : start + images_per_shard]:
                    content = cache.path(key).read_bytes()
                    from_png(content)  # a damaged file is found now
                    writer.write({"__key__": key, EXTENSION: content})
                    bar.update()
            with tarfile.open(path) as archive:
                for member in archive:
                    places[member.name.partition(".")[0]] = [number, member.offset_data, member.size]
    index = {"format": FORMAT, "settings": cache.header["settings"], "places": places}
    beside = folder / f".{INDEX}.{uuid.uuid4().hex}.part"
    beside.write_text(json.dumps(index, sort_keys=True))
    os.replace(beside, folder / INDEX)
    return len(keys)


class SuperpixelShards:
    """Reads superpixels out of shards by key; serves a data set as its ``superpixel_cache``.

    Args:
        folder: what :func:`write_shards` wrote.
        settings: those that are wanted (``generator.settings()``); None = take what is there.

    Raises:
        FileNotFoundError: no index, so no shards, or half written ones.
        ValueError: the shards hold superpixels of other settings, or another format.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: no superpixel shards here, or their writing was interrupted.")
        try:
            content = json.loads(path.read_text())
            self.settings, self.places = content["settings"], content["places"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). Write the shards again.") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"{path} has format {content.get('format')}, this version reads {FORMAT}.")
        if settings is not None:
            check_settings(self.settings, settings, self.folder)

    def __contains__(self, image_key: str) -> bool:
        return image_key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def keys(self) -> list[str]:
        """Of the images, sorted."""
        return sorted(self.places)

    def get(self, image_key: str, image: Any = None, embedding: Any = None) -> RegionMap:
        """The regions of an image; ``image`` and ``embedding`` are not needed.

        Raises:
            FileNotFoundError: not in these shards.
            ValueError: its shard is missing or damaged.
        """
        if image_key not in self.places:
            raise FileNotFoundError(
                f"No superpixels of image {image_key} in {self.folder}. Fill the store, pack again."
            )
        number, offset, size = self.places[image_key]
        path = self.folder / _shard_name(int(number))
        try:
            with path.open("rb") as shard:
                shard.seek(offset)
                return from_png(shard.read(size))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read at image {image_key} ({error}). Write the shards again."
            ) from error


def _shard_name(number: int) -> str:
    return f"superpixels-{number:06d}.tar"
