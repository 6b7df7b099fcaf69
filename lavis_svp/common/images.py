"""Read any image file as upright (H, W, 3) uint8 RGB, or raise an error that names it; resample label maps."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from PIL import ImageFile as PillowImageFile

from lavis_svp.common.files import BrokenFileError

_UPRIGHT = 1
_ORIENTATION_TAG = 0x0112
_BITS_16 = 65535.0
_WHITE = 255


MIRRORED_SUFFIX = "-mirrored"
"""Ends the key of a mirrored image, whose superpixels and features are not those of its original."""


class BadImageError(BrokenFileError):
    """An image file that cannot be read or decoded."""


class MissingImageError(BadImageError, FileNotFoundError):
    """An image file that is not there."""


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A decoded image file.

    Args:
        pixels: (H, W, 3) uint8 RGB, upright.
        stored_size: (H, W) of the image as the file stores it, before its EXIF orientation is applied.
        orientation: the EXIF orientation, 1 to 8; 1 = stored upright.
        key: sha256 of the file's bytes, hexadecimal.
    """

    pixels: np.ndarray
    stored_size: tuple[int, int]
    orientation: int
    key: str


def image_key(content: bytes) -> str:
    """The key of an image in every cache: the sha256 of its file's bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


class ImageFile(Protocol):
    """Where the bytes of one image file are: a ``Path``, or a place in a shard; ``str()`` names it in messages."""

    def read_bytes(self) -> bytes:
        """The whole file; OSError or ValueError where it cannot be read."""


def read_image(file: str | Path | ImageFile) -> LoadedImage:
    """Read an image file in any format that Pillow reads.

    EXIF orientation is applied. Greyscale, palette, CMYK and 16-bit images become 8-bit RGB (16 bits are scaled,
    not clipped); what is transparent shows white; of an animation the first frame counts.

    Raises:
        MissingImageError: no such file.
        BadImageError: the file cannot be read, is truncated, damaged, a folder, or no image; names the file.
    """
    source = Path(file) if isinstance(file, str) else file
    return decode_image(file_bytes(source), str(source))


def file_bytes(file: ImageFile) -> bytes:
    """The bytes of an image file.

    Raises:
        MissingImageError: there is none.
        BadImageError: it cannot be read, or is a folder.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise MissingImageError(f"There is no image file {file}.") from error
    except OSError as error:
        if isinstance(file, Path) and file.is_dir():
            raise BadImageError(f"{file} is a folder; give the path of an image file in it.") from error
        raise BadImageError(f"{file} cannot be read ({type(error).__name__}: {error}).") from error


def decode_image(content: bytes, name: str) -> LoadedImage:
    """Decode an image file's bytes as :func:`read_image` does; ``name`` is the file's, for messages.

    Raises:
        BadImageError: truncated, damaged, or no image.
    """
    try:
        with strict_decoding(), Image.open(io.BytesIO(content)) as image:
            image.load()
            orientation = image.getexif().get(_ORIENTATION_TAG, _UPRIGHT)
            stored = to_rgb(image)
    # Pillow's decoders raise whatever a damaged file drives them into (OSError, SyntaxError, struct.error ...).
    except Exception as error:
        raise BadImageError(
            f"{name} is not a readable image ({type(error).__name__}: {error}). It has {len(content)} bytes; "
            "fetch it again, or remove it from the data set."
        ) from error
    if orientation not in range(1, 9):
        orientation = _UPRIGHT  # cameras write 0 for "unknown"
    pixels = np.ascontiguousarray(make_upright(stored, orientation))
    return LoadedImage(pixels, (stored.shape[0], stored.shape[1]), orientation, image_key(content))


def read_pixels(file: str | Path | ImageFile) -> np.ndarray:
    """(H, W, 3) uint8 of an image file, see :func:`read_image`; for worker processes, which need a name to call."""
    return read_image(file).pixels


def as_image(source: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """Take an image in any usual form and return it as (H, W, 3) uint8 RGB.

    Args:
        source: a file's path; a PIL image (its EXIF orientation is applied); or an array (H, W), (H, W, 1), (H, W, 3)
            or (H, W, 4) of uint8, uint16, bool, or float in [0, 1].

    Raises:
        ValueError: an array of another shape, type or range, or an unreadable file.
        TypeError: anything else.
    """
    if isinstance(source, str | Path):
        return read_image(source).pixels
    if isinstance(source, Image.Image):
        try:
            with strict_decoding():
                source.load()  # Pillow reads an opened file only now
        except Exception as error:
            name = getattr(source, "filename", "") or "The image"
            raise BadImageError(f"{name} is not a readable image ({type(error).__name__}: {error}).") from error
        return np.ascontiguousarray(make_upright(to_rgb(source), source.getexif().get(_ORIENTATION_TAG, _UPRIGHT)))
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source)
    raise TypeError(f"An image is a path, a PIL image or a numpy array, got {type(source).__name__}.")


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a PIL image as (H, W, 3) uint8 RGB, as stored: EXIF orientation is not applied."""
    if image.mode.startswith("I"):  # 16-bit greyscale, whatever the byte order
        levels = np.asarray(image, np.float64) / _BITS_16
        return _array_to_rgb(np.clip(levels, 0.0, 1.0))
    if image.mode == "F":
        levels = np.nan_to_num(np.asarray(image, np.float64))
        return _array_to_rgb(np.clip(levels if levels.max() <= 1.0 else levels / _WHITE, 0.0, 1.0))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        backdrop = Image.new("RGBA", layer.size, (_WHITE,) * 4)
        image = Image.alpha_composite(backdrop, layer)
    return np.array(image.convert("RGB"))


def make_upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror a stored (H, W, ...) array so that its image stands upright, by its EXIF orientation, 1 to 8.

    Any other orientation counts as 1. The result is a view of the array, (W, H, ...) for the orientations 5 to 8.
    """
    if orientation in (3, 4, 6, 7):
        array = array[::-1]
    if orientation in (2, 3, 7):
        array = array[:, ::-1]
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    return array[::-1] if orientation == 8 else array


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]  # (H, W, 1)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"An image array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) and not empty, got {array.shape}. "
            "Is it channels-first? Then transpose it."
        )
    if array.dtype == np.uint16:
        array = array / _BITS_16
    if array.dtype == bool:
        array = array.astype(np.float64)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"An image of floats must lie in [0, 1], this one spans {low:.3g} to {high:.3g}.")
        array = np.rint(array * _WHITE).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"An image array is uint8, uint16, bool or float in [0, 1], got {array.dtype}.")
    if array.shape[2] == 4:
        return to_rgb(Image.fromarray(array, "RGBA"))
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array  # (H, W, 3)


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Let Pillow refuse damaged files; ``import lavis`` tells it, for the whole process, to fill them with grey."""
    before = PillowImageFile.LOAD_TRUNCATED_IMAGES
    PillowImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        PillowImageFile.LOAD_TRUNCATED_IMAGES = before


def nearest(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Sample a mask or label map (H', W') at the pixel centres of another ``size``, (H, W), over the same image.

    Raises:
        ValueError: not a two-dimensional array.
    """
    if array.ndim != 2:
        raise ValueError(f"A mask or label map is (H, W), got shape {array.shape}.")
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(array.shape, size, strict=True))
    return array[np.ix_(rows, columns)]  # (H, W)
