"""A host's processor that makes the superpixels and writes as many placeholders as each image will have tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import BatchFeature
from transformers.image_utils import ImageInput

from lavis_svp.hosts.images import as_arrays, superpixel_inputs, token_counts
from lavis_svp.hosts.placeholders import expand_placeholders
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.projectors.structures import Extent, Grid
from lavis_svp.superpixels import RegionMap


@dataclass(frozen=True)
class ImageLayout:
    """How a host lays the patches of P images out.

    Args:
        shown: (H, W, 3) uint8 RGB each, exactly the field of view of the patches.
        grids: the (h, w) patch grid of each, as the projector will get it.
        extents: share of the grid's height and width that the image covers, or where its cells lie; None: all of it.
        valid: the (h, w) of the patches that show something; None: the whole grids.
        counts: visual tokens of each, where the host has the last word; None: what the projector promises.
    """

    shown: Sequence[np.ndarray]
    grids: Sequence[Grid]
    extents: Sequence[Extent] | None = None
    valid: Sequence[Grid] | None = None
    counts: Sequence[int] | None = None


class SwappedProcessor:
    """Mixin before a host's processor class; the host tells the layout of its patches.

    The class names every setting in its ``__init__``, as transformers saves those that it finds there.
    """

    kwargs_class: ClassVar[Any]
    """The host's ``…ProcessorKwargs``."""

    svp: Mapping[str, Any] | None
    """The recipe as the processor's JSON keeps it."""

    tokenizer: Any
    image_processor: Any
    image_token: str

    @classmethod
    def around(cls, processor: Any, recipe: SwapConfig) -> Any:
        """A swapped processor with the parts and settings of a host's own."""
        named = inspect.signature(type(processor).__init__).parameters  # what transformers saves of a processor
        settings = {key: value for key, value in vars(processor).items() if key in named}
        parts = {name: getattr(processor, name) for name in processor.attributes}
        settings["chat_template"] = getattr(processor, "chat_template", None)
        return cls(**{**settings, **parts, "svp": recipe.to_dict()})

    def layout(self, images: list[np.ndarray], image_inputs: Mapping[str, Any]) -> ImageLayout:
        """Where the patches of the images lie.

        Args:
            images: (H, W, 3) uint8 RGB.
            image_inputs: what the host's image processor made of them.
        """
        raise NotImplementedError

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | Sequence[str] | None = None,
        *,
        region_maps: Sequence[RegionMap] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """As the host's processor.

        Args:
            images: images in the order of their placeholders; lists of lists are flattened.
            text: prompts with one placeholder an image.
            region_maps: superpixels of the images, of their field of view; None: they are made here.
            kwargs: as the host's; ``padding``, ``return_tensors``, …

        Returns:
            the host's entries and the superpixels.

        Raises:
            ValueError: neither images nor text; videos; placeholders that do not match the images.
        """
        if images is None and text is None:
            raise ValueError("Give at least one of images and text.")
        if kwargs.get("videos") is not None:
            raise ValueError("A swapped projector works on images, not on videos: pass the frames as images.")
        recipe = SwapConfig.of(vars(self))
        merged = self._merge_kwargs(  # type: ignore[attr-defined]  # ProcessorMixin's
            self.kwargs_class,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        made: dict[str, Any] = {}
        counts: list[int] = []
        texts = [text] if isinstance(text, str) else list(text or [])
        if images is not None:
            arrays = as_arrays(images)
            made.update(self.image_processor(images, **merged["images_kwargs"]))
            layout = self.layout(arrays, made)
            superpixels = superpixel_inputs(recipe, layout.shown, layout.grids, layout.extents, region_maps)
            made.update(superpixels)
            promised = layout.counts or token_counts(recipe, layout.valid or layout.grids, superpixels)
            counts = list(promised)
        if text is not None:
            texts = expand_placeholders(texts, self.image_token, counts)
        tensor_type = merged["text_kwargs"].pop("return_tensors", None)
        merged["text_kwargs"].pop("return_mm_token_type_ids", None)
        written = self.tokenizer(texts, **merged["text_kwargs"]) if text is not None else {}
        return BatchFeature(data={**written, **made}, tensor_type=tensor_type)
