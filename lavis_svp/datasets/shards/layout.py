"""Names of the files and members of a folder of shards.

A folder holds ``train-000000.tar`` and so on for each split, and ``index.json``. A sample is a group of tar members
with one key, ``<split>-<image id>``: the image's original file (``.jpg`` ...), ``.json`` (see :mod:`.record`) and, if
the shards were made with them, ``.superpixels.png`` and ``.features.safetensors``.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

FORMAT = 1
INDEX = "index.json"
UNFINISHED = "unfinished.json"
RECORD = "json"
SUPERPIXELS = "superpixels.png"
FEATURES = "features.safetensors"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
OTHER_IMAGE = "picture"  # the name stored shards have
"""Extension of an image file that has another one, or none."""

_SPLIT = re.compile(r"[0-9A-Za-z_+-]{1,64}")
_SHARD = re.compile(r"[0-9A-Za-z_+-]{1,64}-[0-9]{6}\.tar")


def shard_name(split: str, number: int) -> str:
    """File name of one shard.

    Raises:
        ValueError: the split's name cannot be part of a file name.
    """
    if not _SPLIT.fullmatch(split):
        raise ValueError(f"A split's name is 1 to 64 letters, digits, '_', '+' or '-', got {split!r}. Rename it.")
    return f"{split}-{number:06d}.tar"


def is_shard_name(name: str) -> bool:
    """Whether this can be the name of a shard; no path can."""
    return _SHARD.fullmatch(name) is not None


def sample_key(split: str, image_id: int) -> str:
    """Key of an image in a split, without the dots at which webdataset ends a key."""
    return f"{split}-{image_id:012d}"


def image_extension(file_name: str) -> str:
    """Extension of the member that holds an image file."""
    extension = PurePosixPath(file_name).suffix.lower().removeprefix(".")
    return extension if extension in IMAGE_EXTENSIONS else OTHER_IMAGE
