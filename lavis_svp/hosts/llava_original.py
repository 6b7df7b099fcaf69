"""Host: the original LLaVA code (haotian-liu/LLaVA), which chooses its projector by ``config.mm_projector_type``.

LLaVA has no registry to hook into, so nothing of it is imported here. Two lines of a copy of LLaVA change: the import
of ``build_vision_projector`` in ``llava_arch.py``, and the bases of the model's class::

    from lavis_svp.hosts.llava_original import RaggedImages, build_vision_projector

    class LlavaLlamaForCausalLM(RaggedImages, LlamaForCausalLM, LlavaMetaForCausalLM): ...

LLaVA passes ``images`` from its data set through collator, trainer and ``generate`` to ``encode_images`` and nothing
else. So the superpixels are two more channels of the images, which are stacked, moved, cast and batched with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig

from lavis_svp.common.checkpoints import WrongCheckpointError
from lavis_svp.common.images import nearest
from lavis_svp.common.paths import write_whole
from lavis_svp.common.tensor_files import load_state
from lavis_svp.common.transfer import to_device
from lavis_svp.hosts.images import as_arrays, build_generator, crop_to_box, field_of_view, tower_features, tower_grid
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.projectors import PatchFeatures, Projector, Superpixels, list_projectors
from lavis_svp.projectors.baselines.mlp import MlpProjector
from lavis_svp.projectors.types import MaskSize
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.types import ENCODER_OUTPUTS
from lavis_svp.zoo import read_published

LLAVA_TYPE = re.compile(r"linear|identity|mlp(\d+)x_gelu")
"""LLaVA's own values of ``mm_projector_type``; the number counts the linear layers."""
PREFIX = "mm_projector."
HEAD = "head."
"""Prefix in our projectors of the layers that are LLaVA's ``mlp2x_gelu``."""
COLOUR_CHANNELS, CHANNELS = 3, 5
NO_SUPERPIXEL, PADDING, FIRST_LABEL = 0, 1, 2
BASE = 128
"""The label channels are two digits of this base, low one first; bfloat16 holds whole numbers up to 256 exactly."""


# ---------------------------------------------------------------- the projector


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """Build a projector of LLaVA or a registered one; takes the place of LLaVA's function of the same name.

    Args:
        config: ``mm_projector_type`` is LLaVA's ``linear``, ``mlp2x_gelu`` (any number) or ``identity``, which give the
            same layers and keys as in LLaVA, or a registered projector, see :func:`llava_swap_config`.
        delay_load: LLaVA's; not used.
        kwargs: LLaVA's; not used.

    Raises:
        ValueError: the type is unknown, or the projector has no such option.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    llava_type = LLAVA_TYPE.fullmatch(kind)
    if llava_type is None:
        if kind not in list_projectors():
            raise ValueError(
                f"Unknown mm_projector_type {kind!r}. Known: linear, identity, mlp<number>x_gelu, "
                f"{', '.join(list_projectors())}."
            )
        try:
            return llava_swap_config(config).build()
        except ValueError as error:
            where = "mm_projector_options, mm_projector_levels and mm_projector_grid of LLaVA's configuration"
            raise ValueError(f"{error} Here that means {where}.") from error
    if kind == "identity":
        return nn.Identity()
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(1, int(llava_type[1] or 1)):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return layers[0] if kind == "linear" else nn.Sequential(*layers)


def llava_swap_config(config: Any) -> SwapConfig:
    """Read the projector from a LLaVA configuration.

    Args:
        config: ``mm_projector_type`` is a registered projector; ``mm_hidden_size`` and ``hidden_size`` are the widths.
            Our optional entries: ``mm_projector_options`` (the projector's options), ``mm_superpixels`` (generator and
            its options, default ``{"name": "sam"}``, as models without the entry were trained; ``one_pass`` is the
            quick one), ``mm_projector_levels`` (layers of the vision tower, for
            projectors that fuse several), ``mm_projector_grid`` ((h, w) patches of an image; by default from the
            configuration of ``mm_vision_tower``).
    """
    grid = getattr(config, "mm_projector_grid", None)
    if grid is None:
        tower = read_published(AutoConfig.from_pretrained, config.mm_vision_tower)
        grid = tower_grid(getattr(tower, "vision_config", tower))
    return SwapConfig(
        name=config.mm_projector_type,
        vision_dim=config.mm_hidden_size,
        llm_dim=config.hidden_size,
        grid=(int(grid[0]), int(grid[1])),
        options=dict(getattr(config, "mm_projector_options", None) or {}),
        superpixels=dict(getattr(config, "mm_superpixels", None) or {"name": "sam"}),
        levels=tuple(getattr(config, "mm_projector_levels", None) or ()),
    )


# ---------------------------------------------------------------- the model


class RaggedImages:
    """Base class in front of LLaVA's ``LlavaMetaForCausalLM``: each image gets its own number of tokens.

    With LLaVA's own projectors, and with `mlp`, which also makes one token per patch, nothing changes.
    """

    def _projector(self) -> Projector | None:
        """Return the projector if it is one of ours, else None."""
        projector = self.get_model().mm_projector  # type: ignore[attr-defined]  # LLaVA's
        return projector if isinstance(projector, Projector) else None

    def encode_images(self, images: Tensor) -> Tensor | list[Tensor]:
        """Encode P images (P, 3, H, W), or (P, 5, H, W) from :class:`SuperpixelImageProcessor`, and project them.

        Returns:
            a list of (K_i, D), which LLaVA splices into the text; for `mlp` one (P, N, D).

        Raises:
            ValueError: the projector needs superpixels and there are no label channels, or the features form no square.
        """
        projector = self._projector()
        if projector is None:
            return super().encode_images(images)  # type: ignore[misc]  # LLaVA's
        features, superpixels = self._features(projector, images[:, :COLOUR_CHANNELS]), None
        if isinstance(projector, MlpProjector):
            return projector(features).tokens  # (P, N, D)
        if images.shape[1] == CHANNELS:
            features, superpixels = read_label_channels(images, features, projector.mask_size)
        elif "superpixels" in projector.requires:
            raise ValueError(
                f"Projector '{projector.name}' needs superpixels, but the images have {images.shape[1]} channels. "
                "Make them with lavis_svp.hosts.llava_original.SuperpixelImageProcessor."
            )
        visual = projector(features, superpixels)
        return [tokens[:count] for tokens, count in zip(visual.tokens, visual.counts, strict=True)]

    def _features(self, projector: Projector, images: Tensor) -> PatchFeatures:
        """Run LLaVA's tower; for projectors that need more than patches, run the model inside the tower."""
        tower = self.get_model().get_vision_tower()  # type: ignore[attr-defined]  # LLaVA's
        side = tower.num_patches_per_side
        if projector.requires & ENCODER_OUTPUTS:
            swap = SwapConfig(
                name=projector.name,
                vision_dim=projector.vision_dim,
                llm_dim=projector.llm_dim,
                grid=projector.grid,
                options=asdict(projector.options),
                levels=tuple(getattr(self.config, "mm_projector_levels", None) or ()),  # type: ignore[attr-defined]  # LLaVA's
            )
            with torch.no_grad():  # as in LLaVA's towers
                return tower_features(tower.vision_tower, images, tower.select_layer, swap)
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
        """Stack the images, then splice them as LLaVA does, which would split a list of images again.

        ``images`` are (P, C, H, W), or a list of (C, H, W). Those without label channels, which LLaVA adds to texts
        without image, get empty ones.

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
                images = torch.stack([add_label_channels(image) if labelled else image for image in images])
        return super().prepare_inputs_labels_for_multimodal(  # type: ignore[misc]  # LLaVA's
            input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
        )


# ---------------------------------------------------------------- the image processor


class SuperpixelImageProcessor:
    """Wrap LLaVA's image processor: the same images, with their superpixels in two more channels.

    Assign it to ``vision_tower.image_processor``, where LLaVA's data set and ``process_images`` look. All other
    attributes are those of the wrapped processor.

    Args:
        image_processor: the vision tower's, of CLIP's kind.
        config: LLaVA's configuration with a registered projector in ``mm_projector_type``.
        pad: pad images to squares; the projector ignores this padding. LLaVA's own ``image_aspect_ratio: pad`` pads
            earlier in the mean colour, which superpixels take for a part of the image: set it to ``square``.
        device: where SAM makes superpixels; None: the CPU, or ``device`` in the configuration's ``mm_superpixels``.
            LLaVA's data set calls this in the workers of a DataLoader, which are forked and can use the CPU only.
    """

    def __init__(self, image_processor: Any, config: Any, pad: bool = True, device: str | None = None) -> None:
        self.image_processor = image_processor
        self.swap = llava_swap_config(config)
        self.pad = pad
        self.device = device

    def __getattr__(self, name: str) -> Any:
        if name == "image_processor":  # not set while a worker unpickles the object
            raise AttributeError(name)
        return getattr(self.image_processor, name)

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        """See :meth:`preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, *, region_maps: Sequence[RegionMap] | None = None, **kwargs: Any) -> Any:
        """Process images as the wrapped processor does, with ``pixel_values`` (P, 5, H, W).

        Without ``region_maps``, the superpixels of the images, the configured generator computes them.

        Raises:
            ValueError: the number of region maps differs from the number of images.
        """
        arrays = as_arrays(images)
        if region_maps is None and "superpixels" in self.swap.on_meta().requires:
            region_maps = build_generator(self.swap.superpixels, self.device)(arrays)
        if region_maps is None:
            labels = [np.full(array.shape[:2], -1) for array in arrays]
        else:
            labels = [np.asarray(region_map.labels) for region_map in region_maps]
        if len(labels) != len(arrays):
            raise ValueError(f"{len(arrays)} images need as many region maps, got {len(labels)}.")
        squares = [self._pad_to_square(array) if self.pad else (array, (0, 0)) for array in arrays]
        inputs = self.image_processor.preprocess([Image.fromarray(square) for square, _ in squares], **kwargs)
        images_with_labels = []
        for array, (square, corner), own, pixels in zip(arrays, squares, labels, inputs["pixel_values"], strict=True):
            channels = self._label_channels(array, square, corner, own, tuple(pixels.shape[-2:]))
            images_with_labels.append(torch.cat([torch.as_tensor(pixels), channels]))  # (5, H, W)
        if isinstance(inputs["pixel_values"], Tensor):
            inputs["pixel_values"] = torch.stack(images_with_labels)
        else:
            inputs["pixel_values"] = [image.numpy() for image in images_with_labels]
        return inputs

    def _pad_to_square(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Put an image into the middle of a square of the mean colour; return the square and the image's corner."""
        height, width = image.shape[:2]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        colour = [int(255 * channel) for channel in self.image_processor.image_mean]
        square = np.full((side, side, COLOUR_CHANNELS), colour, np.uint8)
        square[top : top + height, left : left + width] = image
        return square, (top, left)

    def _label_channels(
        self,
        image: np.ndarray,
        square: np.ndarray,
        corner: tuple[int, int],
        labels: np.ndarray,
        size: tuple[int, int],
    ) -> Tensor:
        """Write the labels of the part of the image that the wrapped processor shows."""
        (height, width), (top, left) = image.shape[:2], corner
        rows = np.arange(height) * labels.shape[0] // height
        columns = np.arange(width) * labels.shape[1] // width
        whole = np.full(square.shape[:2], -1)
        whole[top : top + height, left : left + width] = labels[rows][:, columns]
        padding = np.ones(square.shape[:2], bool)
        padding[top : top + height, left : left + width] = False
        box = field_of_view(self.image_processor, *square.shape[:2])
        return label_channels(crop_to_box(whole, box), size, crop_to_box(padding, box))


def label_channels(labels: np.ndarray, size: tuple[int, int], padding: np.ndarray | None = None) -> Tensor:
    """Write a label map as two channels.

    Args:
        labels: (H', W') integers of the image's field of view; -1 = no superpixel.
        size: (H, W) of the image that gets the channels.
        padding: (H', W') bool, True outside the image; None: no padding.

    Returns:
        (2, H, W) float32.

    Raises:
        ValueError: there are more superpixels than two digits can number.
    """
    limit = BASE * BASE - FIRST_LABEL
    if labels.max() >= limit:
        raise ValueError(f"At most {limit} superpixels fit into the label channels, got {int(labels.max()) + 1}.")
    codes = np.where(labels < 0, NO_SUPERPIXEL, labels + FIRST_LABEL)
    if padding is not None:
        codes = np.where(padding, PADDING, codes)
    codes = nearest(codes, size)
    return torch.from_numpy(np.stack([codes % BASE, codes // BASE])).float()  # (2, H, W)


def add_label_channels(image: Tensor) -> Tensor:
    """Add label channels without superpixels to an image (3, H, W); (5, H, W) stays unchanged."""
    if image.shape[0] not in (COLOUR_CHANNELS, CHANNELS):
        raise ValueError(
            f"An image has {COLOUR_CHANNELS} channels, or {CHANNELS} with its superpixels; got {image.shape[0]}."
        )
    if image.shape[0] == CHANNELS:
        return image
    return torch.cat([image, image.new_full((CHANNELS - COLOUR_CHANNELS, *image.shape[1:]), NO_SUPERPIXEL)])


def read_label_channels(
    images: Tensor, features: PatchFeatures, mask_size: MaskSize
) -> tuple[PatchFeatures, Superpixels]:
    """Read superpixels and padding from images with label channels.

    Args:
        images: (P, 5, H, W). Rows and columns that fill no patch are ignored, as the vision tower ignores them.
        features: features of the vision tower, all on one grid.
        mask_size: the mask size of the projector; see :meth:`Superpixels.from_masks`.

    Returns:
        the features, in which patches that show nothing but padding are invalid, and the superpixels in the order of
        their labels.
    """
    grid, device = features.grids[0], features.patches.device
    height, width = (side // cells * cells for side, cells in zip(images.shape[-2:], grid, strict=True))
    digits = images[:, COLOUR_CHANNELS:, :height, :width].detach().round().to(torch.uint8).cpu().long()  # (P, 2, H, W)
    codes = digits[:, 0] + BASE * digits[:, 1]  # (P, H, W)
    stacks = []
    for image in codes:
        regions = image.unique()
        regions = regions[regions >= FIRST_LABEL]
        stacks.append(image[None] == regions[:, None, None])  # (S, H, W)
    shown = (codes != PADDING).reshape(len(codes), grid[0], height // grid[0], grid[1], width // grid[1])
    valid = to_device(shown.any(dim=4).any(dim=2).flatten(1), device)  # (P, h * w)
    superpixels = Superpixels.from_masks(stacks, features.grids, mask_size=mask_size, device=device)
    return replace(features, valid=valid), superpixels


# ---------------------------------------------------------------- mm_projector.bin


def save_mm_projector(path: str | Path, projector: nn.Module, prefix: str = "model.") -> Path:
    """Write ``mm_projector.bin`` as LLaVA's trainer does, so that LLaVA's loaders read it, and return its path.

    Args:
        path: the file, usually ``mm_projector.bin``; it appears whole or not at all.
        projector: ``model.get_model().mm_projector``.
        prefix: prefix of the projector's module in LLaVA's model.
    """
    weights = {f"{prefix}{PREFIX}{key}": value.detach().cpu() for key, value in projector.state_dict().items()}
    with write_whole(Path(path)) as draft:
        torch.save(weights, draft)
    return Path(path)


def load_mm_projector(path: str | Path, projector: nn.Module) -> list[str]:
    """Load ``mm_projector.bin`` into a projector, ours or LLaVA's.

    The keys may have any prefix before ``mm_projector.``; other keys (of embeddings) are ignored. A file of LLaVA's
    ``mlp2x_gelu`` becomes the head of one of our projectors.

    Args:
        path: the file; no code in it is executed.
        projector: loaded in place.

    Returns:
        names of the parameters that keep their values: all but the head's for a file of ``mlp2x_gelu``, else none.

    Raises:
        FileNotFoundError: the file does not exist.
        BadFileError: the file is damaged, or holds other things than tensors.
        WrongCheckpointError: it holds tensors of another projector; the message lists what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No projector at {path}.")
    state = load_state(path)
    weights = {key.split(PREFIX, 1)[1]: value for key, value in state.items() if PREFIX in key}
    expected = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    as_head = {f"{HEAD}{key}": value for key, value in weights.items()}
    head_keys = {key for key in expected if key.startswith(HEAD)}
    if head_keys and set(as_head) == head_keys and not weights.keys() & expected.keys():
        weights = as_head
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    reshaped = sorted(key for key in weights.keys() & expected.keys() if tuple(weights[key].shape) != expected[key])
    if unexpected or reshaped or (missing and weights is not as_head):
        shapes = [f"{key} {tuple(weights[key].shape)} for {expected[key]}" for key in reshaped]
        raise WrongCheckpointError(
            f"{path} does not fit this projector. Missing: {missing or 'none'}; unexpected: {unexpected or 'none'}; "
            f"other shape: {shapes or 'none'}."
        )
    projector.load_state_dict(weights, strict=False)
    return missing
