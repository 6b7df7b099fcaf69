"""SwappedProcessor: computes superpixels and writes one placeholder per visual token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_utils import ImageInput

from lavis_svp.common.devices import checked_device
from lavis_svp.hosts.images import NO_VIDEOS, as_arrays, superpixel_inputs, token_counts
from lavis_svp.hosts.placeholders import expand_placeholders
from lavis_svp.hosts.swap import DEVICE_KEY, SwapConfig
from lavis_svp.projectors.types import Extent
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.types import Grid


@dataclass(frozen=True)
class ImageLayout:
    """Where the patches of P images lie.

    Args:
        shown: (H, W, 3) uint8 RGB each, exactly the field of view of the patches.
        grids: the (h, w) patch grid of each image, as the projector gets it.
        extents: the share of the grid's height and width that the image covers, or the edges of its cells; None: the
            image covers the whole grid.
        valid: the (h, w) of the patches that show some of the image; None: the whole grids.
        counts: visual tokens of each image, where the host packs them itself; None: the projector's counts.
    """

    shown: Sequence[np.ndarray]
    grids: Sequence[Grid]
    extents: Sequence[Extent] | None = None
    valid: Sequence[Grid] | None = None
    counts: Sequence[int] | None = None


class SwappedProcessor:
    """Base class in front of a host's processor class.

    Every setting appears in the signature of ``__init__``, because transformers saves only those.
    """

    kwargs_class: ClassVar[Any]
    """The host's ``…ProcessorKwargs``."""
    svp: Mapping[str, Any] | None
    """:meth:`SwapConfig.to_dict`, as the processor's JSON stores it."""
    layout: Any
    """A method, (images, image_inputs) -> :class:`ImageLayout`: find where the patches of the images,
    (H, W, 3) uint8 RGB, lie; ``image_inputs`` is the output of the host's image processor. Subclasses define it."""
    tokenizer: Any
    image_processor: Any
    image_token: str
    superpixel_device: str | None = None
    """Where superpixels are computed, see :meth:`to`. It is not saved: ``__init__`` does not have it."""

    def to(self, device: torch.device | str | None) -> Self:
        """Compute superpixels on a device from now on: ``cpu``, ``cuda``, ``cuda:1``, ``auto`` …; returns itself.

        Only SAM uses it. The processor's outputs are on the CPU, as ever. In forked processes, such as the workers of
        a DataLoader, only the CPU works. None: the CPU, unless a configuration of release 0.1 has another.

        Raises:
            ValueError: there is no such device.
        """
        self.superpixel_device = None if device is None else str(checked_device(str(device)))
        return self

    @classmethod
    def from_processor(cls, processor: Any, swap: SwapConfig) -> Any:
        """Build a swapped processor that shares parts and settings with the host's."""
        saved = inspect.signature(type(processor).__init__).parameters
        settings = {key: value for key, value in vars(processor).items() if key in saved}
        parts = {name: getattr(processor, name) for name in processor.attributes}
        settings["chat_template"] = getattr(processor, "chat_template", None)
        return cls(**{**settings, **parts, "svp": swap.to_dict()}).to(swap.superpixels.get(DEVICE_KEY))

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | Sequence[str] | None = None,
        *,
        region_maps: Sequence[RegionMap] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Process images and text as the host's processor does; its entries and the superpixels come back.

        Args:
            images: images in the order of their placeholders; nested lists are flattened.
            text: prompts with one placeholder per image.
            region_maps: superpixels of the images' field of view; None: the swap's generator computes them.
            kwargs: arguments of the host's processor: ``padding``, ``return_tensors``, …

        Raises:
            ValueError: neither images nor text; videos; placeholders that do not match the images.
        """
        if images is None and text is None:
            raise ValueError("Give at least one of images and text.")
        if kwargs.get("videos") is not None:
            raise ValueError(NO_VIDEOS)
        swap = SwapConfig.of(vars(self))
        merged = self._merge_kwargs(  # type: ignore[attr-defined]  # ProcessorMixin's
            self.kwargs_class,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        visual: dict[str, Any] = {}
        counts: list[int] = []
        if images is not None:
            arrays = as_arrays(images)
            visual.update(self.image_processor(images, **merged["images_kwargs"]))
            layout = self.layout(arrays, visual)
            where = (layout.shown, layout.grids, layout.extents)
            visual.update(superpixel_inputs(swap, *where, region_maps, self.superpixel_device))
            projected = layout.valid or layout.grids
            counts = list(layout.counts or token_counts(swap, projected, visual.get("superpixel_valid")))
        tensor_type = merged["text_kwargs"].pop("return_tensors", None)
        merged["text_kwargs"].pop("return_mm_token_type_ids", None)
        words: Mapping[str, Any] = {}
        if text is not None:
            texts = expand_placeholders([text] if isinstance(text, str) else list(text), self.image_token, counts)
            words = self.tokenizer(texts, **merged["text_kwargs"])
        return BatchFeature(data={**words, **visual}, tensor_type=tensor_type)
