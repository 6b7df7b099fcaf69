"""Every sort of image becomes upright 8-bit RGB; damaged files are named."""

import hashlib
import io
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from lavis_svp.common import images as images_module
from lavis_svp.common.files import BrokenFileError
from lavis_svp.common.images import (
    IMAGE_FORMATS,
    MAX_IMAGE_PIXELS,
    BadImageError,
    as_image,
    decode_image,
    file_bytes,
    make_upright,
    open_image,
    read_image,
    strict_decoding,
    to_rgb,
)

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


@pytest.fixture(autouse=True, params=[False, True], ids=["pillow", "after lavis"])
def pillows_setting(request, monkeypatch):
    """LAVIS tells Pillow to fill truncated images with grey; it must not matter, and stay as it was."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)
    yield
    assert request.param == ImageFile.LOAD_TRUNCATED_IMAGES


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr", "CMYK", "RGBA", "LA", "I;16", "I", "F"])
def test_modes(tmp_path, mode):
    suffix = "tif" if mode in ("CMYK", "YCbCr", "F", "I") else "png"
    image = Image.fromarray(COLORS[..., 0]).convert("I").convert(mode) if mode == "I;16" else Image.fromarray(COLORS)
    path = saved(tmp_path / f"a.{suffix}", image if mode == "I;16" else image.convert(mode))
    pixels = read_image(path).pixels
    assert pixels.shape == (12, 20, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous


def test_rgb_is_exact(tmp_path):
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", Image.fromarray(COLORS))).pixels, COLORS)


def test_greyscale_is_repeated(tmp_path):
    pixels = read_image(saved(tmp_path / "a.png", Image.fromarray(COLORS[..., 0]))).pixels
    np.testing.assert_array_equal(pixels, np.repeat(COLORS[..., :1], 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.linspace(0, 65535, 240).round().astype(np.uint16).reshape(12, 20)
    pixels = read_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(levels))).pixels
    np.testing.assert_array_equal(pixels[..., 0], np.rint(levels / 257).astype(np.uint8))


def test_cmyk_jpeg(tmp_path):
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    pixels = read_image(saved(tmp_path / "a.jpg", red, quality=95)).pixels
    assert (abs(pixels.astype(int) - (255, 0, 0)) < 10).all()


def test_transparent_parts_are_white(tmp_path):
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[:6] = 0
    image = Image.fromarray(np.dstack([COLORS, alpha]))
    pixels = read_image(saved(tmp_path / "a.png", image)).pixels
    assert (pixels[:6] == 255).all()
    np.testing.assert_array_equal(pixels[6:], COLORS[6:])


def test_transparent_palette(tmp_path):
    image = Image.fromarray(np.tile(np.arange(2, dtype=np.uint8), (4, 4)), "P")
    image.putpalette([0, 0, 0, 200, 10, 10])
    pixels = read_image(saved(tmp_path / "a.gif", image, transparency=0)).pixels
    assert (pixels[:, ::2] == 255).all() and (pixels[:, 1::2] == (200, 10, 10)).all()


def test_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pixels = read_image(saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])).pixels
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", [0, *range(1, 9), 77])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(COLORS), exif=exif)
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    loaded = read_image(path)
    np.testing.assert_array_equal(loaded.pixels, expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(as_image(image), expected)
    assert loaded.stored_size == (12, 20) and loaded.orientation in range(1, 9)
    assert make_upright(np.zeros((12, 20, 3)), loaded.orientation).shape == expected.shape


def test_key_is_the_hash_of_the_file(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(COLORS))
    assert read_image(path).key == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [(1, 1), (200, 8000), (8000, 200)])
def test_extreme_sizes(tmp_path, size):
    path = saved(tmp_path / "a.png", Image.new("RGB", size[::-1]))
    assert read_image(path).pixels.shape == (*size, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.8])
def test_truncated_files(tmp_path, suffix, share):
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content.getvalue()[: int(share * len(content.getvalue()))])
    with pytest.raises(BadImageError, match=f"cut.{suffix} is not a readable image"):
        read_image(path)


def test_a_missing_file_and_a_folder_are_named_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no image file .*none\.png\.$") as missing:
        read_image(tmp_path / "none.png")
    with pytest.raises(BadImageError, match="is a folder, no regular file") as folder:
        read_image(tmp_path)
    for error in (missing.value, folder.value):
        assert isinstance(error, BrokenFileError) and "\n" not in str(error)


def test_a_file_that_cannot_be_read_is_a_bad_image():
    class Gone:
        def read_bytes(self):
            raise OSError("input/output error")

        def __str__(self):
            return "a.jpg"

    with pytest.raises(BadImageError, match=r"a\.jpg cannot be read \(OSError: input/output error\)"):
        read_image(Gone())


def test_truncated_image_object(tmp_path):
    path = saved(tmp_path / "cut.jpg", Image.fromarray(np.tile(COLORS, (20, 20, 1))))
    path.write_bytes(path.read_bytes()[:-2000])
    with Image.open(path) as image, pytest.raises(BadImageError, match="cut.jpg is not a readable image"):
        as_image(image)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 99, b"\xff\xd8\xff\xe0" * 9])
def test_no_images(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match="a.jpg"):
        read_image(path)


def test_damaged_png_data(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(COLORS))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(BadImageError, match="a.png"):
        read_image(path)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (COLORS, COLORS),
        (COLORS[..., 0], np.repeat(COLORS[..., :1], 3, axis=2)),
        (COLORS[..., :1], np.repeat(COLORS[..., :1], 3, axis=2)),
        (COLORS / 255.0, COLORS),
        ((COLORS / 255.0).astype(np.float32), COLORS),
        (COLORS.astype(np.uint16) * 257, COLORS),
        (COLORS[..., 0] > 9, np.repeat((COLORS[..., :1] > 9) * np.uint8(255), 3, axis=2)),
        (np.dstack([COLORS, np.full((12, 20), 255, np.uint8)]), COLORS),
    ],
)
def test_arrays(array, expected):
    before = array.copy()
    np.testing.assert_array_equal(as_image(array), expected)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 12, 20), np.uint8), "channels-first"),
        (np.zeros((0, 5, 3), np.uint8), "not empty"),
        (np.full((4, 4, 3), 255.0), r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ValueError, match=message):
        as_image(array)


def test_other_things_are_no_images():
    with pytest.raises(TypeError, match="got list"):
        as_image([1, 2])


def test_path_as_image(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(COLORS))
    np.testing.assert_array_equal(as_image(str(path)), COLORS)
    with pytest.raises(FileNotFoundError):
        as_image(tmp_path / "none.png")


# ------------------------------------------------------------------------------------------ hostile and odd files

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3_000_000_000,) * 2)
from lavis_svp.common.images import BadImageError, read_image
try:
    print(read_image(sys.argv[1], int(sys.argv[2])).pixels.shape)
except BadImageError as error:
    print(error)
"""


def read_in_three_gigabytes(path, max_pixels=MAX_IMAGE_PIXELS):
    command = [sys.executable, "-c", LIMITED, str(path), str(max_pixels)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def test_small_files_that_are_gigabytes_in_memory_are_refused_by_their_header(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("I;16", (9500, 9500)).save(path, compress_level=1)
    assert path.stat().st_size < 1_000_000
    message = read_in_three_gigabytes(path)
    assert "bomb.png has 9,500 x 9,500 = 90,250,000 pixels, the limit is 89,478,485" in message
    assert "sampling.max_image_pixels" in message and "\n" not in message


def test_the_limit_is_an_option(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(COLORS))
    for read in (read_image, as_image, lambda file, limit: as_image(Image.open(file), limit)):
        with pytest.raises(BadImageError, match=r"a\.png has 20 x 12 = 240 pixels, the limit is 239"):
            read(path, 239)
        read(path, 240)
    with pytest.raises(BadImageError, match="the limit is 239"):
        decode_image(path.read_bytes(), "a.png", 239)
    with pytest.raises(BadImageError, match="the limit is 239"), open_image(path, 239):
        pass
    assert as_image(Image.new("L", (20, 12)), 239).shape == (12, 20, 3)  # it is in memory already


@pytest.mark.parametrize("action", ["default", "error"])
def test_over_pillows_own_limit(tmp_path, monkeypatch, action):
    path = saved(tmp_path / "a.png", Image.fromarray(COLORS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 if action == "default" else 200)
    with warnings.catch_warnings(), pytest.raises(BadImageError, match=r"a\.png has too many pixels"):
        warnings.simplefilter(action)
        read_image(path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("size", [(23, 31), (1, 400), (400, 1)])
def test_large_images_are_converted_in_strips_to_the_same_pixels(monkeypatch, mode, size):
    values = np.random.default_rng(1).integers(0, 256, (*size, 4), dtype=np.uint8)
    if mode == "F":
        levels = values[..., 0] + np.float32(0.5)
        levels[0, 0], levels[-1, -1] = np.nan, np.inf
        image = Image.fromarray(levels)
    elif mode.startswith("I"):
        wide = values[..., 0].astype(np.uint16) * 256 + values[..., 1]
        image = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32) * 2 - 100)
    else:
        image = Image.fromarray(values).convert(mode)
        if mode == "P":
            image.info["transparency"] = 7
    whole = to_rgb(image)
    monkeypatch.setattr(images_module, "_STRIP_PIXELS", 100)
    np.testing.assert_array_equal(to_rgb(image), whole)


def test_what_has_no_end_or_no_bytes_is_refused(tmp_path):
    fifo, endless, sparse = tmp_path / "fifo.png", tmp_path / "zero.png", tmp_path / "sparse.png"
    os.mkfifo(fifo)
    endless.symlink_to("/dev/zero")
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    for path, words in ((fifo, "FIFO"), (endless, "device"), (sparse, "1,099,511,627,776 bytes")):
        assert words in read_in_three_gigabytes(path)
        with pytest.raises(BadImageError, match=path.name):
            file_bytes(path)
    for path in (fifo, endless):
        with pytest.raises(BadImageError, match=path.name), open_image(path):
            pass


def test_no_format_that_starts_a_program(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    canary = tmp_path / "bin" / "gs"
    canary.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    canary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    path = tmp_path / "cat.jpg"
    Image.fromarray(COLORS).save(path, "EPS")
    reads = {read_image: "PNG, JPEG", as_image: "PNG, JPEG", lambda file: as_image(Image.open(file)): "start a program"}
    for read, reason in reads.items():
        with pytest.raises(BadImageError, match=rf"cat\.jpg is .*{reason}"):
            read(path)
    assert not (tmp_path / "ran").exists()
    assert not {"EPS", "WMF", "TGA"} & set(IMAGE_FORMATS)


def test_what_a_caller_has_opened_is_taken_in_any_other_format(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.tga")
    np.testing.assert_array_equal(as_image(Image.open(tmp_path / "a.tga")), COLORS)
    with pytest.raises(BadImageError, match="in none of the formats"):
        read_image(tmp_path / "a.tga")


def test_images_without_pixels():
    with pytest.raises(ValueError, match="without pixels .0 x 5"):
        as_image(Image.new("RGB", (0, 5)))


def test_a_header_is_read_without_the_pixels(tmp_path):
    path = saved(tmp_path / "cut.png", Image.fromarray(np.tile(COLORS, (20, 20, 1))))
    path.write_bytes(path.read_bytes()[:200])
    with open_image(str(path)) as image:
        assert image.size == (400, 240)
    with pytest.raises(BadImageError, match=r"cut\.png is not a readable image"), open_image(path) as image:
        image.load()
    with pytest.raises(FileNotFoundError, match="There is no image file"), open_image(tmp_path / "none"):
        pass


def test_one_line_for_each_damaged_file(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000"):
        content = io.BytesIO()
        Image.fromarray(COLORS).save(content, kind)
        for _ in range(20):
            damaged = bytearray(content.getvalue())
            for place in rng.integers(0, len(damaged), 4):
                damaged[place] = rng.integers(256)
            try:
                decode_image(bytes(damaged), "a.img")
            except BadImageError as error:
                assert "a.img" in str(error) and "\n" not in str(error)


def test_threads_that_decode_together_stay_strict():
    """The first that ends must not allow the others to fill damaged images with grey."""
    before, inside, release = ImageFile.LOAD_TRUNCATED_IMAGES, threading.Event(), threading.Event()

    def decode():
        with strict_decoding():
            inside.set()
            release.wait(10)

    other = threading.Thread(target=decode)
    with strict_decoding():
        other.start()
        inside.wait(10)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    release.set()
    other.join()
    assert before == ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_forked_process_forgets_the_threads_of_its_parent():
    with strict_decoding():
        pass
    inside, release = threading.Event(), threading.Event()
    before = ImageFile.LOAD_TRUNCATED_IMAGES

    def decode():
        with strict_decoding():
            inside.set()
            release.wait(20)

    other = threading.Thread(target=decode)
    other.start()
    inside.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        right = before == ImageFile.LOAD_TRUNCATED_IMAGES
        with strict_decoding():
            right &= not ImageFile.LOAD_TRUNCATED_IMAGES
        os._exit(0 if right and before == ImageFile.LOAD_TRUNCATED_IMAGES else 1)
    release.set()
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
