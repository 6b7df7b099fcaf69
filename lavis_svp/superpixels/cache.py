"""Superpixels on disk, keyed by image and settings, so that training never computes them twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lavis_svp.common.paths import cache_root
from lavis_svp.superpixels.generator import SamEmbedding, SuperpixelGenerator
from lavis_svp.superpixels.png import from_png, to_png
from lavis_svp.superpixels.region_map import RegionMap

_HEADER = "settings.json"
_FORMAT = 1
_KEY = re.compile(r"[0-9A-Za-z_-]{2,128}")
_DIGEST_LENGTH = 12


class SuperpixelCache:
    """One PNG an image in ``root/<generator>-<digest of its settings>/<first two digits of the key>/``.

    A file is whole or absent (written beside, then renamed), so work that is killed goes on where it stopped,
    and several processes may fill one cache.

    Args:
        generator: makes what is missing; or only its settings, for a cache that is read and never filled.
        root: the folder of all superpixel caches; None = ``cache_root()/superpixels``.

    Raises:
        ValueError: the folder holds superpixels of other settings or another format.
    """

    def __init__(self, generator: SuperpixelGenerator | Mapping[str, Any], root: str | Path | None = None) -> None:
        self.generator = generator if isinstance(generator, SuperpixelGenerator) else None
        settings = generator.settings() if isinstance(generator, SuperpixelGenerator) else dict(generator)
        self.header: dict[str, Any] = {"format": _FORMAT, "settings": settings}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_DIGEST_LENGTH]
        base = Path(root) if root is not None else cache_root() / "superpixels"
        self.folder = base / f"{settings.get('generator', 'superpixels')}-{digest}"
        self._check_header()

    def path(self, image_key: str) -> Path:
        """Where the regions of an image are, or will be.

        Raises:
            ValueError: the key is not one that can name a file.
        """
        if not _KEY.fullmatch(image_key):
            raise ValueError(f"An image's key is 2 to 128 letters, digits, '-' or '_' (its sha256), got {image_key!r}.")
        return self.folder / image_key[:2] / f"{image_key}.png"

    def __contains__(self, image_key: str) -> bool:
        return self.path(image_key).is_file()

    def get(self, image_key: str, image: np.ndarray | None = None, embedding: SamEmbedding | None = None) -> RegionMap:
        """The regions of an image: read if they are here, else computed from what is given, and kept.

        Args:
            image_key: the image's sha256.
            image: (H, W, 3) uint8, for a generator that works on images.
            embedding: for one that works on SAM embeddings.

        Raises:
            FileNotFoundError: not here, and nothing given to compute it from.
            ValueError: the file is damaged, and nothing given to compute it anew from.
        """
        path = self.path(image_key)
        source = embedding if self.generator is not None and self.generator.needs_embedding else image
        try:
            return from_png(path.read_bytes())
        except FileNotFoundError:
            if self.generator is None or source is None:
                raise FileNotFoundError(
                    f"No superpixels of image {image_key} at {path}. Fill the cache first, or pass a generator and "
                    "the image (or its SAM embedding)."
                ) from None
        except ValueError as error:
            if self.generator is None or source is None:
                raise ValueError(f"{path} is damaged ({error}). Delete it and fill the cache again.") from error
        regions = _segment(self.generator, source)
        self.keep(image_key, regions)
        return regions

    def keys(self) -> list[str]:
        """Of the images whose regions are here, sorted."""
        return sorted(path.stem for path in self.folder.glob("??/*.png"))

    def keep(self, image_key: str, regions: RegionMap) -> None:
        """Write the regions of an image."""
        _write(self.path(image_key), to_png(regions))

    def _check_header(self) -> None:
        path = self.folder / _HEADER
        if path.is_file():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}). Delete the folder {self.folder}.") from error
            if found.get("format") != _FORMAT:
                raise ValueError(f"{path} has format {found.get('format')}, this version reads {_FORMAT}.")
            check_settings(found.get("settings"), self.header["settings"], self.folder)
        elif any(self.folder.glob("??/*.png")):
            raise ValueError(
                f"{self.folder} holds superpixels, but no {_HEADER} that says how they were made. Delete the folder."
            )
        else:
            _write(path, json.dumps(self.header, indent=2, sort_keys=True).encode())


def open_store(folder: str | Path) -> SuperpixelCache:
    """Open a store by its own folder (``<generator>-<digest>``), to read it.

    Raises:
        FileNotFoundError: not such a folder.
        ValueError: its header is damaged, or does not belong to its name.
    """
    folder = Path(folder)
    path = folder / _HEADER
    if not path.is_file():
        stores = ", ".join(sorted(str(found.parent) for found in folder.glob(f"*/{_HEADER}"))) or "none"
        raise FileNotFoundError(f"{folder} is no store of superpixels ({_HEADER} is missing). Stores in it: {stores}.")
    try:
        settings = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {folder}.") from error
    cache = SuperpixelCache(settings, folder.resolve().parent)
    if cache.folder.name != folder.resolve().name:
        raise ValueError(f"{path} has the settings of {cache.folder.name}, not of this folder. Was it renamed?")
    return cache


def check_settings(found: Any, wanted: Mapping[str, Any], where: Path | str, what: str = "superpixels") -> None:
    """Refuse superpixels (or features) that were made otherwise.

    Args:
        found: settings in a store's header.
        wanted: those of the generator at hand.
        where: the store, for the message.
        what: it holds, for the message.

    Raises:
        ValueError: they differ; the message names the settings that do.
    """
    target = json.loads(json.dumps(dict(wanted)))  # as JSON gives them back: tuples are lists
    if found != target:
        known = found if isinstance(found, dict) else {}
        missing = "(not set)"
        names = sorted({*known, *target})
        differ = [name for name in names if known.get(name, missing) != target.get(name, missing)]
        pairs = [f"{name}: {known.get(name, missing)!r} there, {target.get(name, missing)!r} wanted" for name in differ]
        raise ValueError(f"{where} holds {what} made with other settings ({'; '.join(pairs)}). Use another folder.")


def _segment(generator: SuperpixelGenerator, source: Any) -> RegionMap:
    return generator(embeddings=[source])[0] if generator.needs_embedding else generator([source])[0]


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or absent, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
