"""What the hosts with tiled images share: which views an image has, and its visual tokens, packed or projected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.options import build_options
from lavis_svp.hosts.anyres import Canvas, assemble
from lavis_svp.hosts.features import tower_features, tower_grid
from lavis_svp.hosts.generation import RaggedGeneration
from lavis_svp.hosts.images import SUPERPIXEL_KEYS, received_superpixels, token_counts
from lavis_svp.hosts.llava_parts import SwappedClasses, swap_llava_projector
from lavis_svp.hosts.placeholders import place
from lavis_svp.hosts.processor import ImageLayout, SwappedProcessor
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.hosts.registry import SwapChoices
from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.mlp import MlpProjector
from lavis_svp.projectors.registry import PROJECTORS

Size = tuple[int, int]


def is_patchwise(recipe: SwapConfig) -> bool:
    """Does the projector make one token of each patch? Then the host packs its tokens as it packs its own."""
    return issubclass(PROJECTORS.get(recipe.name), MlpProjector)


def grid_multiple(name: str, options: Mapping[str, Any]) -> int:
    """What a projector wants the sides of its grids to be multiples of.

    Raises:
        UnknownNameError: no such projector.
        ValueError: an option that it does not have.
    """
    return build_options(PROJECTORS.get(name).options_class, options, f"model.projector ('{name}')").grid_multiple


def as_sizes(image_sizes: Tensor | Sequence[Sequence[int]]) -> list[Size]:
    """(H, W) of each image as plain numbers, from whatever a processor gives."""
    return [(int(height), int(width)) for height, width in image_sizes]


class AnyresModel:
    """Mixin before a host's model without head; the host tells its canvases and packs what is patchwise."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any
    recipe: SwapConfig
    multiple: int
    """What the projector wants the sides of its grid to be multiples of."""
    most_views: int | None = None
    """Views beyond which the host pools a canvas; None: it never does."""

    def canvases(self, image_sizes: Tensor, **by_row: Any) -> list[Canvas]:
        """The canvas of each image.

        Args:
            image_sizes: (P, 2) height and width in pixels.
            by_row: what else the host's processor gave that decides it.
        """
        raise NotImplementedError

    def pack(self, tokens: Sequence[Tensor], image_sizes: Tensor) -> list[Tensor]:
        """The host's packing of one (views, N, D) an image, with newlines."""
        raise NotImplementedError

    def image_counts(
        self,
        image_sizes: Tensor,
        superpixel_valid: Tensor | None = None,
        batch_num_images: Any = None,
        **others: Tensor,
    ) -> list[int]:
        """Visual tokens of each image, from its size and its superpixels."""
        canvases = self.canvases(image_sizes, batch_num_images=batch_num_images)
        if is_patchwise(self.recipe):
            return [canvas.packed_tokens(self.most_views) for canvas in canvases]
        known = {} if superpixel_valid is None else {"superpixel_valid": superpixel_valid}
        return token_counts(self.recipe, [canvas.shown for canvas in canvases], known)

    def visual_tokens(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        canvases: Sequence[Canvas],
        superpixels: Mapping[str, Tensor | None],
    ) -> tuple[Tensor, list[int]]:
        """Encode the views of P images and project them.

        Args:
            pixel_values: (P, V, 3, H, W), padded to as many views as the image with most has.
            image_sizes: (P, 2).
            canvases: of the images.
            superpixels: what the processor gave.

        Returns:
            (sum T, D) the tokens, image after image, and how many each has.

        Raises:
            ValueError: views that were not padded, or fewer than a canvas is made of.
        """
        if pixel_values.ndim != 5 or any(canvas.views > pixel_values.shape[1] for canvas in canvases):
            raise ValueError(
                f"pixel_values must be (images, views, 3, height, width) with {[c.views for c in canvases]} views, "
                f"got {tuple(pixel_values.shape)}: leave the image processor's do_pad on."
            )
        pairs = zip(pixel_values, canvases, strict=True)
        views = torch.cat([pixels[: canvas.views] for pixels, canvas in pairs])  # (V, 3, H, W)
        features = tower_features(self.vision_tower, views, self.config.vision_feature_layer, self.recipe)
        if is_patchwise(self.recipe):
            tokens = self.multi_modal_projector(features).tokens  # (V, N, D)
            packed = self.pack(tokens.split([canvas.views for canvas in canvases]), image_sizes)
            return torch.cat(packed), [len(image) for image in packed]
        weights, masks, valid = (superpixels.get(key) for key in SUPERPIXEL_KEYS)
        received = received_superpixels(weights, masks, valid, pixel_values.device)
        whole: PatchFeatures = assemble(features, canvases)
        return self.multi_modal_projector(whole, received).packed()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        superpixel_weights: Tensor | None = None,
        superpixel_masks: Tensor | None = None,
        superpixel_valid: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        batch_num_images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's, with ragged visual tokens at the placeholders.

        Args:
            input_ids: (B, L), one placeholder a visual token.
            pixel_values: (P, V, 3, H, W) of all images of the batch, in order.
            image_sizes: (P, 2) height and width in pixels, before any resizing.
            inputs_embeds: (B, L, D) in place of ``input_ids``, without images.
            superpixel_weights: (P, S, N).
            superpixel_masks: (P, S, Hm, Wm).
            superpixel_valid: (P, S).
            pixel_values_videos: must be None.
            batch_num_images: images of each prompt, where the host treats several otherwise than one.
            kwargs: as the host's.

        Raises:
            ValueError: images without ``input_ids`` or ``image_sizes``, counts that do not match the placeholders,
                or videos.
        """
        if pixel_values_videos is not None:
            raise ValueError("A swapped projector works on images, not on videos: pass the frames as images.")
        if pixel_values is not None:
            if input_ids is None or image_sizes is None:
                raise ValueError("Images need image_sizes, and input_ids, whose placeholders say where they stand.")
            given = (superpixel_weights, superpixel_masks, superpixel_valid)
            canvases = self.canvases(image_sizes, batch_num_images=batch_num_images)
            superpixels = dict(zip(SUPERPIXEL_KEYS, given, strict=True))
            packed, counts = self.visual_tokens(pixel_values, image_sizes, canvases, superpixels)
            text = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]  # the host's
            inputs_embeds = place(text, input_ids == self.config.image_token_id, packed, counts)
            input_ids = None
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]


class AnyresGeneration(RaggedGeneration):
    """Mixin before a host's ``…ForConditionalGeneration``: sizes travel with the images."""

    image_keys = (*RaggedGeneration.image_keys, "image_sizes")


class AnyresProcessor(SwappedProcessor):
    """Mixin before a host's processor; the host tells its canvases."""

    patch_size: Any
    most_views: int | None = None

    def canvases(self, image_inputs: Mapping[str, Any], side: int, multiple: int) -> list[Canvas]:
        """The canvas of each image.

        Args:
            image_inputs: what the host's image processor made.
            side: of a view, in pixels.
            multiple: what the projector wants the sides of its grid to be multiples of.
        """
        raise NotImplementedError

    def layout(self, images: list[np.ndarray], image_inputs: Mapping[str, Any]) -> ImageLayout:
        """See :meth:`SwappedProcessor.layout`: the whole image, on the patches of its canvas that show it."""
        recipe = SwapConfig.of(vars(self))
        multiple = grid_multiple(recipe.name, recipe.options)
        canvases = self.canvases(image_inputs, view_side(self.image_processor), multiple)
        counts = [canvas.packed_tokens(self.most_views) for canvas in canvases] if is_patchwise(recipe) else None
        return ImageLayout(
            images,
            grids=[canvas.grid for canvas in canvases],
            extents=[canvas.edges for canvas in canvases],
            valid=[canvas.shown for canvas in canvases],
            counts=counts,
        )


def view_side(image_processor: Any) -> int:
    """Pixels along the side of a tile, and of the base view.

    Raises:
        ValueError: views that the image processor resizes or crops to several sizes.
    """
    size = image_processor.size
    sides = {size.get("shortest_edge") or size["height"], size.get("shortest_edge") or size["width"]}
    if getattr(image_processor, "do_center_crop", False):
        sides |= {image_processor.crop_size["height"], image_processor.crop_size["width"]}
    if len(sides) != 1:
        raise ValueError(f"The image processor must give square views of one side, its size and crop_size are {sides}.")
    return int(sides.pop())


def swap_anyres(
    model: Any,
    processor: Any,
    choices: SwapChoices,
    classes: SwappedClasses,
) -> tuple[Any, Any]:
    """Swap the projector of a host with tiled images.

    Args:
        model: of the host.
        processor: of the host.
        choices: of the user.
        classes: ours for it.

    Raises:
        ValueError: model and processor cut images in different ways.
    """
    vision, images = model.config.vision_config, processor.image_processor
    pinpoints = [[list(size) for size in part.image_grid_pinpoints] for part in (model.config, images)]
    if pinpoints[0] != pinpoints[1] or view_side(images) != vision.image_size:
        raise ValueError(
            f"The model has views of {vision.image_size} pixels and canvases {pinpoints[0]}, its image processor views "
            f"of {view_side(images)} and canvases {pinpoints[1]}: take the processor that belongs to the model."
        )
    multiple = grid_multiple(choices.projector, choices.options)
    height, width = tower_grid(vision)
    grid = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    shared = ("vision_tower", "language_model", "image_newline")
    swapped, around = swap_llava_projector(model, processor, choices, grid, classes, shared)
    around.patch_size = vision.patch_size
    return swapped, around
