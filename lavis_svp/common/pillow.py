"""Reading images with Pillow so that damage is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ImageFile


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Let Pillow refuse damaged files; ``import lavis`` tells it, for the whole process, to fill them with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
