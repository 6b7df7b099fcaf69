"""``svp_image_train`` and ``svp_image_eval``: an image as the one tensor that all encoders take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from PIL import Image, ImageEnhance

from lavis_svp.common.images import as_image
from lavis_svp.common.options import build_options, plain
from lavis_svp.vision.geometry import to_sam_input

ImageSource = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class ImageEvalOptions:
    """Options of ``svp_image_eval``.

    Args:
        image_size: S, the side of SAM's frame in pixels, a multiple of 16. 1024 as published.
    """

    image_size: int = 1024

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16 (SAM's patch), got {self.image_size}.")


@dataclass(frozen=True)
class ImageTrainOptions(ImageEvalOptions):
    """Options of ``svp_image_train``; without augmentation it does what ``svp_image_eval`` does.

    Args:
        image_size: as for evaluation.
        brightness, contrast, saturation: largest relative change, 0 = none. Frozen features from a cache do not
            contain it.
        hflip_prob: how often the dataset mirrors an image together with its masks and the words left and right. The
            processor sees the image alone and never mirrors.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hflip_prob: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.hflip_prob <= 1.0:
            raise ValueError(f"hflip_prob must lie in [0, 1], got {self.hflip_prob}.")


@dataclass(frozen=True)
class ColorJitter:
    """Changes an image's colours, never its geometry.

    Args:
        brightness, contrast, saturation: largest relative change, in [0, 1]; each factor is drawn evenly from
            1 - x to 1 + x. 0 = no change.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Change one image.

        Args:
            image: (H, W, 3) uint8 RGB; it is not changed.
            rng: draws the factors.

        Returns:
            (H, W, 3) uint8; the image itself if all changes are off.
        """
        steps = (
            (self.brightness, ImageEnhance.Brightness),
            (self.contrast, ImageEnhance.Contrast),
            (self.saturation, ImageEnhance.Color),
        )
        if not any(amount for amount, _ in steps):
            return image
        pil_image = Image.fromarray(image)
        for amount, enhance in steps:
            if amount:
                pil_image = enhance(pil_image).enhance(rng.uniform(1.0 - amount, 1.0 + amount))
        return np.array(pil_image)


@registry.register_processor("svp_image_eval")
class SvpImageEvalProcessor(BaseProcessor):
    """An image in the frame that vision encoder and SAM share.

    Supported: a path, a PIL image, a (H, W[, 1|3|4]) array. Usage::

        image = vis_processors["eval"](Image.open("cat.jpg")).unsqueeze(0)  # (1, 4, S, S)

    Args:
        options: see :class:`ImageEvalOptions`.
    """

    def __init__(self, options: ImageEvalOptions | None = None) -> None:
        super().__init__()
        self.options = options or ImageEvalOptions()

    def __call__(self, item: ImageSource) -> torch.Tensor:
        """(4, S, S) float32: RGB in [0, 1], then 1 on the image and 0 on the padding.

        Raises:
            ValueError: an unreadable file (its name is in the message) or an array that is no image.
        """
        return to_sam_input(as_image(item), self.options.image_size)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> SvpImageEvalProcessor:
        """Build it from a YAML section; an unknown key is an error that names it."""
        return cls(build_options(ImageEvalOptions, _without_name(cfg), "svp_image_eval"))


@registry.register_processor("svp_image_train")
class SvpImageTrainProcessor(BaseProcessor):
    """An image for training: :class:`SvpImageEvalProcessor` with colour changes.

    Args:
        options: see :class:`ImageTrainOptions`.
    """

    takes_rng = True
    """The dataset passes its generator, so that a resumed run repeats the same changes."""

    def __init__(self, options: ImageTrainOptions | None = None) -> None:
        super().__init__()
        self.options = options or ImageTrainOptions()
        self.hflip_prob = self.options.hflip_prob
        self.jitter = ColorJitter(self.options.brightness, self.options.contrast, self.options.saturation)

    def __call__(self, item: ImageSource, rng: np.random.Generator | None = None) -> torch.Tensor:
        """(4, S, S) float32, see :class:`SvpImageEvalProcessor`.

        Args:
            item: the image.
            rng: draws the colour changes; None = a fresh one.
        """
        image = self.jitter(as_image(item), rng or np.random.default_rng())
        return to_sam_input(image, self.options.image_size)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> SvpImageTrainProcessor:
        """Build it from a YAML section; an unknown key is an error that names it."""
        return cls(build_options(ImageTrainOptions, _without_name(cfg), "svp_image_train"))


def _without_name(cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (plain(cfg) or {}).items() if key != "name"}
