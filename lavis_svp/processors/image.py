"""``svp_image_train`` and ``svp_image_eval``: an image as the one tensor that all encoders take.

Called, a processor returns floats with a validity channel; data sets call its ``resized``, a fifth of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lavis.common.registry import registry
from PIL import Image, ImageEnhance

from lavis_svp.common.images import as_image
from lavis_svp.processors import OptionsProcessor
from lavis_svp.vision.geometry import resize_to_sam_input, to_sam_input

ImageSource = str | Path | Image.Image | np.ndarray

_COLOUR_OPTIONS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True)
class ImageEvalOptions:
    """Options of ``svp_image_eval``.

    Args:
        image_size: S, the side of SAM's frame in pixels, a multiple of 16. 1024 as published.
    """

    image_size: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) or self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16 (SAM's patch), got {self.image_size!r}.")


@dataclass(frozen=True)
class ImageTrainOptions(ImageEvalOptions):
    """Options of ``svp_image_train``; without augmentation it does what ``svp_image_eval`` does.

    Args:
        image_size: as for evaluation.
        brightness, contrast, saturation: largest relative change, in [0, 1]; each factor is drawn evenly from
            1 - x to 1 + x. Not with cached features, which would not contain it.
        hflip_prob: how often the dataset mirrors an image together with its masks and the words left and right. The
            processor sees the image alone and never mirrors.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hflip_prob: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*_COLOUR_OPTIONS, "hflip_prob"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}.")


def jitter_colors(image: np.ndarray, options: ImageTrainOptions, rng: np.random.Generator) -> np.ndarray:
    """Change an image's colours, never its geometry.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        options: how much at most.
        rng: draws the factors.

    Returns:
        (H, W, 3) uint8; the image itself if all changes are off.
    """
    steps = (
        (options.brightness, ImageEnhance.Brightness),
        (options.contrast, ImageEnhance.Contrast),
        (options.saturation, ImageEnhance.Color),
    )
    if not any(amount for amount, _ in steps):
        return image
    pil_image = Image.fromarray(image)
    for amount, enhance in steps:
        if amount:
            pil_image = enhance(pil_image).enhance(rng.uniform(1.0 - amount, 1.0 + amount))
    return np.array(pil_image)


@registry.register_processor("svp_image_eval")
class SvpImageEvalProcessor(OptionsProcessor):
    """An image in the frame that vision encoder and SAM share.

    Supported: a path, a PIL image, a (H, W[, 1|3|4]) array. Usage::

        image = vis_processors["eval"](Image.open("cat.jpg")).unsqueeze(0)  # (1, 4, S, S)

    Args:
        options: see :class:`ImageEvalOptions`.
    """

    name = "svp_image_eval"
    options_cls = ImageEvalOptions

    def __call__(self, item: ImageSource) -> torch.Tensor:
        """(4, S, S) float32: RGB in [0, 1], then 1 on the image and 0 on the padding.

        Raises:
            ValueError: an unreadable file (its name is in the message) or an array that is no image.
        """
        return to_sam_input(as_image(item), self.options.image_size)

    def resized(self, item: ImageSource, rng: np.random.Generator | None = None) -> torch.Tensor:
        """(3, S, S) uint8 RGB, zeros in the padding: what data sets send; raises what a call raises.

        Args:
            item: the image.
            rng: not used.
        """
        return resize_to_sam_input(as_image(item), self.options.image_size)


@registry.register_processor("svp_image_train")
class SvpImageTrainProcessor(OptionsProcessor):
    """An image for training: :class:`SvpImageEvalProcessor` with colour changes.

    Args:
        options: see :class:`ImageTrainOptions`.
    """

    name = "svp_image_train"
    options_cls = ImageTrainOptions
    takes_rng = True
    """The dataset passes its generator, so that a resumed run repeats the same changes."""

    @property
    def hflip_prob(self) -> float:
        """How often the dataset mirrors an image."""
        return self.options.hflip_prob

    @property
    def colour_changes(self) -> list[str]:
        """The options of colour that are on."""
        return [name for name in _COLOUR_OPTIONS if getattr(self.options, name)]

    def __call__(self, item: ImageSource, rng: np.random.Generator | None = None) -> torch.Tensor:
        """(4, S, S) float32, see :class:`SvpImageEvalProcessor`.

        Args:
            item: the image.
            rng: draws the colour changes; None = a fresh one.
        """
        return to_sam_input(self._jittered(item, rng), self.options.image_size)

    def resized(self, item: ImageSource, rng: np.random.Generator | None = None) -> torch.Tensor:
        """(3, S, S) uint8, see :meth:`SvpImageEvalProcessor.resized`.

        Args:
            item: the image.
            rng: draws the colour changes; None = a fresh one.
        """
        return resize_to_sam_input(self._jittered(item, rng), self.options.image_size)

    def _jittered(self, item: ImageSource, rng: np.random.Generator | None) -> np.ndarray:
        return jitter_colors(as_image(item), self.options, rng or np.random.default_rng())
