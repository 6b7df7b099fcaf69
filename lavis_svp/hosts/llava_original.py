"""Host: the original LLaVA code (haotian-liu/LLaVA), where a projector is chosen by ``config.mm_projector_type``.

LLaVA has no registry to hook into, so nothing of it is imported here. Two lines of one's copy of it change: where
``llava_arch.py`` imports ``build_vision_projector``, and the bases of the model's class::

    from lavis_svp.hosts.llava_original import RaggedImages, build_vision_projector

    class LlavaLlamaForCausalLM(RaggedImages, LlamaForCausalLM, LlavaMetaForCausalLM): ...

Superpixels come in the images themselves, see :mod:`lavis_svp.hosts.label_channels`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig

from lavis_svp.hosts.features import tower_features, tower_grid
from lavis_svp.hosts.images import as_arrays, build_generator, cropped, field_of_view
from lavis_svp.hosts.label_channels import CHANNELS, COLOURS, label_channels, read_channels, with_channels
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.projectors import PatchFeatures, Projector, list_projectors
from lavis_svp.projectors.base import ENCODER_OUTPUTS
from lavis_svp.projectors.mlp import MlpProjector
from lavis_svp.superpixels import RegionMap

OWN_TYPE = re.compile(r"linear|identity|mlp(\d+)x_gelu")
"""LLaVA's own values of ``mm_projector_type``; the number is that of the linear layers."""


def llava_recipe(config: Any) -> SwapConfig:
    """The projector that a LLaVA configuration names.

    Args:
        config: ``mm_projector_type`` is a registered projector, ``mm_hidden_size`` and ``hidden_size`` are the widths.
            Optional, ours: ``mm_projector_options`` (its choices), ``mm_superpixels`` (generator and its options,
            default ``{"name": "sam"}``), ``mm_projector_levels`` (layers of the vision tower, for projectors that fuse
            several), ``mm_projector_grid`` ((h, w) patches of an image; without it the configuration of
            ``mm_vision_tower`` is read).
    """
    grid = getattr(config, "mm_projector_grid", None)
    if grid is None:
        tower = AutoConfig.from_pretrained(config.mm_vision_tower)
        grid = tower_grid(getattr(tower, "vision_config", tower))
    return SwapConfig(
        name=config.mm_projector_type,
        vision_dim=config.mm_hidden_size,
        llm_dim=config.hidden_size,
        grid=(int(grid[0]), int(grid[1])),
        options=dict(getattr(config, "mm_projector_options", None) or {}),
        superpixels=dict(getattr(config, "mm_superpixels", None) or {"name": "sam"}),
        levels=_levels(config),
    )


def _levels(config: Any) -> tuple[int, ...]:
    return tuple(getattr(config, "mm_projector_levels", None) or ())


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """LLaVA's builder, which knows the registered projectors as well.

    Args:
        config: ``mm_projector_type`` is LLaVA's ``linear``, ``mlp2x_gelu`` (any number) or ``identity``, which become
            the same layers with the same keys as LLaVA's, or a registered projector, see :func:`llava_recipe`.
        delay_load: as LLaVA calls it; unread.
        kwargs: as LLaVA calls it; unread.

    Raises:
        ValueError: an unknown type; lists the known ones. Or an option that the projector does not have.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    own = OWN_TYPE.fullmatch(kind)
    if own is None:
        if kind not in list_projectors():
            raise ValueError(
                f"Unknown mm_projector_type {kind!r}. Known: linear, identity, mlp<number>x_gelu, "
                f"{', '.join(list_projectors())}."
            )
        try:
            return llava_recipe(config).build()
        except ValueError as error:
            where = "mm_projector_options, mm_projector_levels and mm_projector_grid of LLaVA's configuration"
            raise ValueError(f"{error} Here that means {where}.") from error
    if kind == "identity":
        return nn.Identity()
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(1, int(own[1] or 1)):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return layers[0] if kind == "linear" else nn.Sequential(*layers)


class RaggedImages:
    """Mixin before LLaVA's ``LlavaMetaForCausalLM``: images with as many tokens as they have.

    With LLaVA's own projectors, and with `mlp`, which makes one token a patch as they do, everything stays LLaVA's.
    """

    def _projector(self) -> Projector | None:
        """The projector, if it is one of ours; else None."""
        found = self.get_model().mm_projector  # type: ignore[attr-defined]  # LLaVA's
        return found if isinstance(found, Projector) else None

    def encode_images(self, images: Tensor) -> Tensor | list[Tensor]:
        """The visual tokens of P images.

        Args:
            images: (P, 3, H, W), or (P, 5, H, W) as :class:`SuperpixelImageProcessor` gives them.

        Returns:
            a list of (K_i, D), which LLaVA splices in as it is; for `mlp` one (P, N, D).

        Raises:
            ValueError: no label channels where the projector needs superpixels; features that are no square grid.
        """
        projector = self._projector()
        if projector is None:
            return super().encode_images(images)  # type: ignore[misc]  # LLaVA's
        features, superpixels = self._features(projector, images[:, :COLOURS]), None
        if isinstance(projector, MlpProjector):
            return projector(features).tokens  # (P, N, D)
        if images.shape[1] == CHANNELS:
            features, superpixels = read_channels(images, features, projector.mask_size)
        elif "superpixels" in projector.requires:
            raise ValueError(
                f"Projector '{projector.name}' needs superpixels, but the images have {images.shape[1]} channels. "
                "Make them with lavis_svp.hosts.llava_original.SuperpixelImageProcessor."
            )
        made = projector(features, superpixels)
        return [tokens[valid] for tokens, valid in zip(made.tokens, made.valid, strict=True)]

    def _features(self, projector: Projector, images: Tensor) -> PatchFeatures:
        """Patches as LLaVA's tower gives them; for projectors that want more, from the model inside the tower."""
        tower = self.get_model().get_vision_tower()  # type: ignore[attr-defined]  # LLaVA's
        side = tower.num_patches_per_side
        if projector.requires & ENCODER_OUTPUTS:
            recipe = SwapConfig(
                name=projector.name,
                vision_dim=projector.vision_dim,
                llm_dim=projector.llm_dim,
                grid=projector.grid,
                options=asdict(projector.options),
                levels=_levels(self.config),  # type: ignore[attr-defined]  # LLaVA's
            )
            with torch.no_grad():  # as LLaVA's towers
                return tower_features(tower.vision_tower, images, tower.select_layer, recipe)
        patches = tower(images)  # (P, N, C)
        if patches.shape[1] != side**2:
            raise ValueError(
                f"The vision tower gave {patches.shape[1]} tokens for {side}x{side} patches. "
                "Set mm_vision_select_feature to 'patch', without CLS."
            )
        return PatchFeatures.whole(patches, (side, side))

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | Sequence[Tensor] | None,
        image_sizes: Any = None,
    ) -> Any:
        """As LLaVA's, which splits its images again if they come in a list; ours are stacked here instead.

        Args:
            input_ids: (B, L), -200 at images.
            position_ids: (B, L).
            attention_mask: (B, L).
            past_key_values: cache.
            labels: (B, L).
            images: (P, C, H, W), or a list of (C, H, W); those without label channels, as LLaVA gives them to texts
                without image, get them.
            image_sizes: as LLaVA's.

        Raises:
            ValueError: tiles (``image_aspect_ratio: anyres``) with a projector other than `mlp`.
        """
        projector = self._projector()
        if projector is not None and not isinstance(projector, MlpProjector) and images is not None:
            shapes = [tuple(image.shape) for image in images]
            if any(len(shape) != 3 or shape[1:] != shapes[0][1:] for shape in shapes):
                raise ValueError(
                    f"Projector '{projector.name}' takes images of one size and one view each, got {shapes}. Set "
                    "image_aspect_ratio to 'pad' or 'square'; tiles are for `mlp`, or for Hugging Face's LLaVA-NeXT."
                )
            if not isinstance(images, Tensor):
                labelled = any(shape[0] == CHANNELS for shape in shapes)
                images = torch.stack([with_channels(image) if labelled else image for image in images])
        return super().prepare_inputs_labels_for_multimodal(  # type: ignore[misc]  # LLaVA's
            input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
        )


class SuperpixelImageProcessor:
    """Around LLaVA's image processor: the same images, with their superpixels in two more channels.

    Put it where LLaVA's data set and ``process_images`` look: ``vision_tower.image_processor``. Every other attribute
    is the inner one's.

    Args:
        image_processor: the vision tower's, of CLIP's kind.
        config: of LLaVA, with the registered projector in ``mm_projector_type``.
        pad: pad images to squares here; no projector then sees the padding. LLaVA's own ``image_aspect_ratio: pad``
            pads before, in the mean colour, which superpixels take for a part of the image: set it to ``square``.
    """

    def __init__(self, image_processor: Any, config: Any, pad: bool = True) -> None:
        self.image_processor = image_processor
        self.recipe = llava_recipe(config)
        self.pad = pad

    def __getattr__(self, name: str) -> Any:
        if name == "image_processor":  # not there yet: being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.image_processor, name)

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        """See :meth:`preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, *, region_maps: Sequence[RegionMap] | None = None, **kwargs: Any) -> Any:
        """As the image processor's, with ``pixel_values`` (P, 5, H, W).

        Args:
            images: PIL images or arrays, one or several.
            region_maps: their superpixels; None: the generator that the configuration names makes them.
            kwargs: as the image processor's.

        Raises:
            ValueError: another number of region maps than of images.
        """
        arrays = as_arrays(images)
        if region_maps is None:
            needed = "superpixels" in self.recipe.outline().requires
            region_maps = build_generator(self.recipe.superpixels)(arrays) if needed else None
        labels = (
            [np.full(array.shape[:2], -1) for array in arrays]
            if region_maps is None
            else [np.asarray(region_map.labels) for region_map in region_maps]
        )
        if len(labels) != len(arrays):
            raise ValueError(f"{len(arrays)} images need as many region maps, got {len(labels)}.")
        squares = [self._square(array) for array in arrays] if self.pad else [(p, (0, 0)) for p in arrays]
        made = self.image_processor.preprocess([Image.fromarray(square) for square, _ in squares], **kwargs)
        channels = []
        for array, (square, corner), own, pixels in zip(arrays, squares, labels, made["pixel_values"], strict=True):
            channels.append(self._channels(array, square, corner, own, tuple(pixels.shape[-2:])))
        kind = type(made["pixel_values"])
        pairs = zip(made["pixel_values"], channels, strict=True)
        joined = [torch.cat([torch.as_tensor(pixels), extra]) for pixels, extra in pairs]  # each (5, H, W)
        made["pixel_values"] = torch.stack(joined) if issubclass(kind, Tensor) else [image.numpy() for image in joined]
        return made

    def _square(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """An image in the middle of a square of the mean colour, and where its first corner lies."""
        height, width = image.shape[:2]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        colour = [int(255 * channel) for channel in self.image_processor.image_mean]
        square = np.full((side, side, COLOURS), colour, np.uint8)
        square[top : top + height, left : left + width] = image
        return square, (top, left)

    def _channels(
        self,
        image: np.ndarray,
        square: np.ndarray,
        corner: tuple[int, int],
        labels: np.ndarray,
        size: tuple[int, int],
    ) -> Tensor:
        """The label channels of the part of the image that the image processor shows."""
        (height, width), (top, left) = image.shape[:2], corner
        rows = np.arange(height) * labels.shape[0] // height
        columns = np.arange(width) * labels.shape[1] // width
        whole = np.full(square.shape[:2], -1)
        whole[top : top + height, left : left + width] = labels[rows][:, columns]
        padding = np.ones(square.shape[:2], bool)
        padding[top : top + height, left : left + width] = False
        box = field_of_view(self.image_processor, *square.shape[:2])
        return label_channels(cropped(whole, box), size, cropped(padding, box))
