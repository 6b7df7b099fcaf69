"""Read any image file as upright (H, W, 3) uint8 RGB, or raise an error that names it; resample label maps."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL import ImageFile as PillowImageFile

from lavis_svp.common.files import BadFileError, BrokenFileError, one_line, open_regular, read_regular

MAX_IMAGE_PIXELS = 89_478_485
"""Pixels of the largest image that is read where nothing else is said: those from which Pillow warns of a bomb."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""The formats that are read, by Pillow's names, HEIF where a plugin is registered: none that starts a program, and none
without a signature (TGA), as which a damaged file of another format would be taken."""

PROGRAM_FORMATS = ("EPS", "WMF")
"""Formats for which Pillow starts a program, or asks the system, once it decodes an opened image."""

_MAX_BYTES_PER_PIXEL = 16  # four channels of 32 bits; a larger file is refused before it fills the memory
_STRIP_PIXELS = 1 << 22  # converted at a time, so that large images need no large arrays of floats
_KEY = re.compile(r"[0-9A-Za-z_-]{2,128}")
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


def checked_key(key: str) -> str:
    """Return an image's key if it can name a file of a cache; a ValueError otherwise: data may state it."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"An image's key is 2 to 128 letters, digits, '-' or '_' (its sha256), got {key!r}.")
    return key


class ImageFile(Protocol):
    """Where the bytes of one image file are: a ``Path``, or a place in a shard; ``str()`` names it in messages."""

    def read_bytes(self) -> bytes:
        """The whole file; OSError or ValueError where it cannot be read."""


def read_image(file: str | Path | ImageFile, max_pixels: int = MAX_IMAGE_PIXELS) -> LoadedImage:
    """Read an image file in one of the :data:`IMAGE_FORMATS`.

    EXIF orientation is applied. Greyscale, palette, CMYK and 16-bit images become 8-bit RGB (16 bits are scaled,
    not clipped); what is transparent shows white; of an animation the first frame counts.

    Args:
        file: the image file.
        max_pixels: height times width of the largest image that is read; above 178,956,970 Pillow refuses, too.

    Raises:
        MissingImageError: no such file.
        BadImageError: the file cannot be read, is truncated, damaged, no regular file, no image, of another format, or
            too large; names the file.
    """
    source = Path(file) if isinstance(file, str) else file
    return decode_image(file_bytes(source, max_pixels), str(source), max_pixels)


def file_bytes(file: ImageFile, max_pixels: int = MAX_IMAGE_PIXELS) -> bytes:
    """The bytes of an image file.

    Args:
        file: the image file.
        max_pixels: of the largest image; a file of more than 16 bytes for each of them is refused.

    Raises:
        MissingImageError: there is none.
        BadImageError: it cannot be read, is too large, a folder, a FIFO or a device.
    """
    with _reading_errors(file):
        if isinstance(file, Path):
            return read_regular(file, _MAX_BYTES_PER_PIXEL * max_pixels)
        return file.read_bytes()


@contextmanager
def open_image(file: str | Path | ImageFile, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Image.Image]:
    """Open an image file to read its header (size, mode, bands), or more of it, in the block.

    Args:
        file: the image file; a path is not read whole.
        max_pixels: as in :func:`read_image`.

    Raises:
        MissingImageError, BadImageError: see :func:`read_image`; also for what Pillow raises within the block.
    """
    source = Path(file) if isinstance(file, str) else file
    with _reading_errors(source):
        stream = open_regular(source) if isinstance(source, Path) else io.BytesIO(source.read_bytes())
    with stream, _opened(stream, str(source), max_pixels) as image:
        yield image


def decode_image(content: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> LoadedImage:
    """Decode an image file's bytes as :func:`read_image` does; ``name`` is the file's, for messages.

    Raises:
        BadImageError: truncated, damaged, no image, of another format, or too large.
    """
    with _opened(io.BytesIO(content), name, max_pixels) as image:
        image.load()
        orientation = image.getexif().get(_ORIENTATION_TAG, _UPRIGHT)
        stored = to_rgb(image)
    if orientation not in range(1, 9):
        orientation = _UPRIGHT  # cameras write 0 for "unknown"
    pixels = np.ascontiguousarray(make_upright(stored, orientation))
    return LoadedImage(pixels, (stored.shape[0], stored.shape[1]), orientation, image_key(content))


def read_pixels(file: str | Path | ImageFile, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8 of an image file, see :func:`read_image`; for worker processes, which need a name to call."""
    return read_image(file, max_pixels).pixels


@contextmanager
def _reading_errors(file: ImageFile) -> Iterator[None]:
    """Turn what reading a file raises into a :class:`BadImageError` that names it; a damaged shard's error stays."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingImageError(f"There is no image file {file}.") from error
    except BrokenFileError:
        raise
    except BadFileError as error:
        raise BadImageError(str(error)) from error
    except OSError as error:
        raise BadImageError(f"{file} cannot be read ({one_line(error)}).") from error


@contextmanager
def _opened(stream: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    with _decoding_errors(name), strict_decoding(), Image.open(stream, formats=IMAGE_FORMATS) as image:
        _check_size(image, name, max_pixels)
        yield image


@contextmanager
def _decoding_errors(name: str) -> Iterator[None]:
    """Turn whatever a damaged file drives Pillow's decoders into (SyntaxError, struct.error ...) into one error."""
    try:
        yield
    except BadFileError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"{name} has too many pixels ({one_line(error)}). Make the image smaller.") from error
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: an old Pillow does not know one of the formats
        raise BadImageError(
            f"{name} is not a readable image: it is damaged, or in none of the formats {', '.join(IMAGE_FORMATS)}. "
            "Fetch it again, convert it, or remove it from the data set."
        ) from error
    except Exception as error:
        raise BadImageError(
            f"{name} is not a readable image ({one_line(error)}). Fetch it again, or remove it from the data set."
        ) from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels == 0:
        raise BadImageError(f"{name} is an image without pixels ({image.width} x {image.height}).")
    if pixels > max_pixels:
        raise BadImageError(
            f"{name} has {image.width:,} x {image.height:,} = {pixels:,} pixels, the limit is {max_pixels:,}. Make it "
            "smaller, or raise the limit: sampling.max_image_pixels of its data set, --max-image-pixels of a command."
        )


def as_image(source: str | Path | Image.Image | np.ndarray, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Take an image in any usual form and return it as (H, W, 3) uint8 RGB.

    Args:
        source: a file's path; a PIL image (its EXIF orientation is applied); or an array (H, W), (H, W, 1), (H, W, 3)
            or (H, W, 4) of uint8, uint16, bool, or float in [0, 1].
        max_pixels: of files, and of PIL images that are not decoded yet, see :func:`read_image`.

    Raises:
        ValueError: an array of another shape, type or range, an image without pixels, or an unreadable file.
        TypeError: anything else.
    """
    if isinstance(source, str | Path):
        return read_image(source, max_pixels).pixels
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "The image")
        opened = isinstance(source, PillowImageFile.ImageFile)  # Pillow decodes such a one only now
        if opened and source.format in PROGRAM_FORMATS:
            raise BadImageError(f"{name} is {source.format}, for which Pillow would start a program. Convert it.")
        _check_size(source, name, max_pixels if opened else source.width * source.height)
        with _decoding_errors(name), strict_decoding():
            source.load()
            return np.ascontiguousarray(make_upright(to_rgb(source), source.getexif().get(_ORIENTATION_TAG, _UPRIGHT)))
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source)
    raise TypeError(f"An image is a path, a PIL image or a numpy array, got {type(source).__name__}.")


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a PIL image as (H, W, 3) uint8 RGB, as stored: EXIF orientation is not applied."""
    white = _white_level(image)
    if image.width * image.height <= _STRIP_PIXELS:
        return _strip_to_rgb(image, white)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        pixels[top : top + strip.height] = _strip_to_rgb(strip, white)
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image cut into strips of whole rows: (first row, strip)."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _white_level(image: Image.Image) -> float | None:
    """The number that is white in an image of 16-bit or floating-point numbers; None for any other."""
    if image.mode.startswith("I"):  # 16-bit greyscale, whatever the byte order
        return _BITS_16
    if image.mode != "F":
        return None
    highest = max(float(np.nan_to_num(np.asarray(strip)).max()) for _, strip in _strips(image))
    return 1.0 if highest <= 1.0 else float(_WHITE)


def _strip_to_rgb(image: Image.Image, white: float | None) -> np.ndarray:
    if white is not None:
        levels = np.nan_to_num(np.asarray(image, np.float64)) / white
        grey = np.rint(np.clip(levels, 0.0, 1.0) * _WHITE).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)  # (H, W, 3)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        backdrop = Image.new("RGBA", layer.size, (_WHITE,) * 4)
        image = Image.alpha_composite(backdrop, layer)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


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


class _Strictness:
    """Pillow's setting for damaged files, which threads that decode at the same time share."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, False

    def enter(self) -> None:
        with self.lock:
            if self.users == 0:
                self.before = PillowImageFile.LOAD_TRUNCATED_IMAGES
                PillowImageFile.LOAD_TRUNCATED_IMAGES = False
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                PillowImageFile.LOAD_TRUNCATED_IMAGES = self.before

    def forked(self) -> None:
        """Forget the parent's other threads, which a child process does not have."""
        if self.users:
            PillowImageFile.LOAD_TRUNCATED_IMAGES = self.before
        self.lock, self.users = threading.Lock(), 0


_STRICTNESS = _Strictness()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_STRICTNESS.forked)


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Let Pillow refuse damaged files; ``import lavis`` tells it, for the whole process, to fill them with grey.

    The last of the threads that decode restores the setting.
    """
    _STRICTNESS.enter()
    try:
        yield
    finally:
        _STRICTNESS.leave()


def nearest(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Sample a mask or label map (H', W') at the pixel centres of another ``size``, (H, W), over the same image.

    Raises:
        ValueError: not a two-dimensional array.
    """
    if array.ndim != 2:
        raise ValueError(f"A mask or label map is (H, W), got shape {array.shape}.")
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(array.shape, size, strict=True))
    return array[np.ix_(rows, columns)]  # (H, W)
