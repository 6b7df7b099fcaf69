"""Image files: every format that Pillow writes, damaged; bombs, devices, formats that start programs, odd arrays."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.damage import damaged_bytes
from tests.fuzz.files import Files, listed, odd_places
from tests.fuzz.outcomes import Case, Target
from tests.fuzz.stores import png_of

MODES = ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16", "F")
PER_FORMAT = 130
SIZE = (24, 18)
MEGABYTE, ADLER = 2**20, 65521
BOMB = 13_300  # a side: 177 million pixels, below Pillow's own limit
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\nshowpage\n%%EOF\n"


def build(folder: Path) -> list[Target]:
    """All targets of image files."""
    folder = folder / "images"
    folder.mkdir(parents=True)
    written = _written(folder)
    files = Files(folder)
    rows = []
    for file in written:
        read = functools.partial(_read, folder / file)
        rows.append(
            Target(
                f"image, {Path(file).suffix[1:]}", PER_FORMAT, files.damaged(file, read, damaged_bytes),
                intact=_intact(files, read),
            )
        )  # fmt: skip
    return [*rows, _odd_files(files, folder), _arrays()]


def _read(path: Path) -> Any:
    from lavis_svp.common.images import read_image

    loaded = read_image(path)
    return [loaded.pixels, loaded.stored_size, loaded.orientation]


def _intact(files: Files, read: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        from lavis_svp.common.files import BadFileError

        files.place({})
        try:
            return read()
        except BadFileError:  # a format that the package does not read
            return "refused"

    return run


def _written(folder: Path) -> list[str]:
    """One file of each format that Pillow writes without more than pixels; their names."""
    from PIL import Image

    Image.init()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (*SIZE[::-1], 3), np.uint8))
    names = []
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            path = folder / f"a.{kind.lower()}"
            try:
                image.convert(mode).save(path, kind)
            except Exception:  # this format holds no such pixels, or is a stub
                path.unlink(missing_ok=True)
                continue
            names.append(path.name)
            break
    return names


def packed_zeros(count: int) -> bytes:
    """``zlib.compress(bytes(count))``, in no time: a part that says a megabyte of zeros, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    part = packer.compress(bytes(MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    end = rest.compress(bytes(count % MEGABYTE)) + rest.flush()
    adler = (count % ADLER) << 16 | 1
    return b"\x78\xda" + part * (count // MEGABYTE) + end + adler.to_bytes(4, "big")


def png_bomb(side: int, depth: int, colour: int) -> bytes:
    """A small PNG of many pixels, all zero."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    data = packed_zeros(side * (1 + side * channels * depth // 8))
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")])


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that only says how large it is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")])


def _tiff(side: int, compressed: bytes) -> bytes:
    """A TIFF of 32-bit floats in one deflated strip."""
    strip = 8
    entries = [
        (256, 4, side), (257, 4, side), (258, 3, 32), (259, 3, 8), (262, 3, 1), (273, 4, strip), (277, 3, 1),
        (278, 4, side), (279, 4, len(compressed)), (339, 3, 3),
    ]  # fmt: skip
    place = strip + len(compressed) + len(compressed) % 2
    table = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries
    )
    return b"II*\0" + struct.pack("<I", place) + compressed + bytes(len(compressed) % 2) + table + bytes(4)


def _odd_files(files: Files, folder: Path) -> Target:
    contents: dict[str, bytes] = {
        "16-bit bomb": png_bomb(BOMB, 16, 0), "RGBA bomb": png_bomb(BOMB, 8, 6), "grey bomb": png_bomb(BOMB, 8, 0),
        "RGB bomb": png_bomb(9600, 8, 2), "TIFF of floats": _tiff(BOMB, packed_zeros(BOMB * BOMB * 4)),
        "a PNG of 2^31 - 1": png_of_size(2**31 - 1, 2**31 - 1), "a PNG of one row": png_of_size(2**31 - 1, 1),
        "a PNG of 60,000": png_of_size(60_000, 60_000), "a PNG of 0 x 0": png_of_size(0, 0), "of 0 x 5": png_of_size(0,
        5),
        "a BMP of 2^31": b"BM" + bytes(8) + struct.pack("<IIiiHHIIIIII", 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0,
        0, 0, 0),
        "a GIF of 65,535": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
        "a PPM of 10^9": b"P6\n1000000000 1000000000\n255\nabc", "a PPM of text": b"P3\n9 9\n255\n" + b"9" * 100_000,
        "a TGA of 65,535": bytes([0, 0, 10, *[0] * 9]) + struct.pack("<HHBB", 65535, 65535, 24, 0) + b"\xff\0\0\0" * 50,
        "EPS": EPS, "EPS with a preview": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, len(EPS), 0, 0, 0, 0,
        0) + EPS,
        "WMF": bytes.fromhex("d7cdc69a0000000000000a000a00480000000000") + bytes(40),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/hostname'/></svg>",
        "PDF": b"%PDF-1.4\n", "HTML": b"<html>", "text": b"hello", "zeros": bytes(1000),
    }  # fmt: skip
    cases = []
    for label, content in contents.items():
        for name in ("cat.jpg", "cat.png"):
            read = functools.partial(_read, folder / name)
            cases.append(files.case(f"{label} as {name}", {name: content}, read, (name,)))
    for what, place in odd_places(folder / "a.png").items():
        cases.append(files.case(what, {"cat.jpg": place}, functools.partial(_read, folder / "cat.jpg"), ("cat.jpg",)))
    return listed("images: bombs, programs, devices", cases, gigabytes=2.0)


def _arrays() -> Target:
    """What as_image is called with."""
    from PIL import Image

    def as_image(make: Callable[[], Any]) -> Any:
        from lavis_svp.common.images import as_image as convert

        pixels = convert(make())
        return [pixels.shape, pixels]

    makes: dict[str, Callable[[], Any]] = {
        f"{kind.__name__} {shape}": functools.partial(np.zeros, shape, kind)
        for kind in (np.uint8, np.int64, np.float16, np.complex64, bool, object, np.uint16)
        for shape in (
            (),
            (0,),
            (0, 0),
            (0, 0, 3),
            (4, 4),
            (4, 4, 1),
            (3, 4, 4),
            (4, 4, 3),
            (4, 4, 4),
            (4, 4, 5),
            (1, 4, 4, 3),
        )
    }
    makes |= {
        "NaN": lambda: np.full((4, 4), np.nan), "inf": lambda: np.full((4, 4), np.inf),
        "negative": lambda: -np.ones((4, 4)),
        "0..255 floats": lambda: np.full((4, 4), 255.0), "texts": lambda: np.array([["a"]]), "a list": lambda: [[1]],
        "None": lambda: None, "a number": lambda: 5, "bytes": lambda: b"abc", "PIL 0 x 0": lambda: Image.new("RGB", (0,
        0)),
        "PIL 0 x 5": lambda: Image.new("RGB", (0, 5)),
        **{f"PIL {mode}": functools.partial(Image.new, mode, (4, 4)) for mode in (
            "1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La",
            "I;16",
            "I;16L", "I;16B")},
        "a closed file": lambda: _closed(),
    }  # fmt: skip
    return listed(
        "images as arrays", [Case(label, functools.partial(as_image, make)) for label, make in makes.items()], api=True
    )


def _closed() -> Any:
    from PIL import Image

    buffer = io.BytesIO(png_of_size(4, 4))
    image = Image.open(buffer)
    buffer.close()
    return image
