"""The frozen vision encoder that makes patch features out of pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lavis_svp.encoders.families import VisionFamily, family_of
from lavis_svp.encoders.frozen import FrozenModule
from lavis_svp.projectors.structures import PatchFeatures
from lavis_svp.zoo import Weights, model_config, resolve

Fit = Literal["stretch", "pad"]
Extent = tuple[int, int]


class VisionEncoder(FrozenModule):
    """Patch features of a plain ViT; frozen.

    Args:
        network: a transformers vision model with an embedding per patch.
        family: how this kind of model wants its input and gives its output.
        side: input side in pixels, divisible by the patch size.
        fit: "stretch" stretches the picture over the whole grid; "pad" keeps its aspect ratio, the rest of the grid
            being invalid patches.
        layer: which layer's patches are returned: -1 the last with the final norm; else the index of a hidden
            state, 0 being the embedding, negative from the end (-2 is LLaVA's choice for CLIP), without final norm.
        levels: indices, as for ``layer``, of layers returned besides, as ``PatchFeatures.levels``.

    Raises:
        ValueError: a side that the patch size does not divide, or a layer that does not exist.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: PreTrainedModel,
        family: VisionFamily,
        side: int = 224,
        fit: Fit = "stretch",
        layer: int = -1,
        levels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        config = network.config
        if side < config.patch_size or side % config.patch_size:
            lower = max(side // config.patch_size, 1) * config.patch_size
            raise ValueError(
                f"The vision encoder's side {side} is not a multiple of its patch size {config.patch_size}. "
                f"The nearest are {lower} and {lower + config.patch_size}."
            )
        if fit not in get_args(Fit):
            raise ValueError(f"Unknown fit '{fit}'. Known: {', '.join(get_args(Fit))}.")
        for index in (layer, *levels):
            if not -config.num_hidden_layers - 1 <= index <= config.num_hidden_layers:
                raise ValueError(f"Layer {index} does not exist: the encoder has {config.num_hidden_layers} layers.")
        self.network = network
        self.family = family
        self.dim: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self.side = side
        self.grid = (side // self.patch_size, side // self.patch_size)
        self.fit = fit
        self.layer = layer
        self.levels = tuple(levels)
        self.register_buffer("mean", torch.tensor(family.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(family.std).view(3, 1, 1), persistent=False)
        self.freeze()

    @torch.no_grad()
    def forward(self, pixels: Tensor, valid_extent: Sequence[Extent] | None = None) -> PatchFeatures:
        """Encode pictures.

        Args:
            pixels: (B, 3, H, W) RGB in [0, 1]; each picture top-left in its frame, padding elsewhere.
            valid_extent: rows and columns of the frame, in pixels, that each picture takes; None: all.

        Returns:
            Features of ``dim`` channels on the ``grid``; a patch that shows nothing of the picture is not valid.

        Raises:
            ValueError: extents that do not fit the pixels.
        """
        extents = checked_extents(pixels, valid_extent)
        outputs = self.network(
            pixel_values=self.frame(pixels, extents),
            output_hidden_states=self.layer != -1 or bool(self.levels),
            **self.family.arguments,
        )
        levels = [self._patches(outputs, index) for index in self.levels]
        return PatchFeatures(
            patches=self._patches(outputs, self.layer),
            grids=[self.grid] * len(extents),
            valid=self._valid(extents, pixels),
            levels=torch.stack(levels, dim=1) if levels else None,  # (B, L, N, C)
        )

    def frame(self, pixels: Tensor, extents: Sequence[Extent]) -> Tensor:
        """Normalise pictures and resize them (bilinear, antialiased) to the encoder's input.

        Args:
            pixels: (B, 3, H, W) RGB in [0, 1].
            extents: rows and columns that each picture takes.

        Returns:
            (B, 3, side, side); padding is 0, the mean colour.
        """
        framed = []
        for picture, (height, width) in zip(pixels, extents, strict=True):
            shown = (picture[:, :height, :width] - self.mean) / self.std  # (3, height, width)
            if self.fit == "pad":
                edge = max(pixels.shape[2:])
                shown = functional.pad(shown, (0, edge - width, 0, edge - height))  # (3, edge, edge)
            size = (self.side, self.side)
            framed.append(functional.interpolate(shown[None], size, mode="bilinear", antialias=True))
        return torch.cat(framed)  # (B, 3, side, side)

    def picture_shares(self, pixels: Tensor, valid_extent: Sequence[Extent] | None = None) -> list[tuple[float, float]]:
        """The share of the grid's height and width that each picture covers, as ``Superpixels.from_region_maps`` asks.

        Args:
            pixels: (B, 3, H, W), for its size alone.
            valid_extent: as for ``forward``.
        """
        extents = checked_extents(pixels, valid_extent)
        if self.fit == "stretch":
            return [(1.0, 1.0)] * len(extents)
        edge = max(pixels.shape[2:])
        return [(height / edge, width / edge) for height, width in extents]

    def _patches(self, outputs: BaseModelOutput, index: int) -> Tensor:
        """Patch tokens (B, N, C) of layer ``index``, without the tokens that stand before them."""
        hidden = outputs.last_hidden_state if index == -1 else outputs.hidden_states[index]
        return hidden[:, self.family.prefix_tokens(self.network.config) :]  # (B, N, C)

    def _valid(self, extents: Sequence[Extent], pixels: Tensor) -> Tensor:
        """(B, N) bool: the patch shows some of the picture."""
        h, w = self.grid
        shares = torch.tensor(self.picture_shares(pixels, extents), device=pixels.device)
        rows = torch.arange(h, device=pixels.device) < shares[:, :1] * h  # (B, h)
        columns = torch.arange(w, device=pixels.device) < shares[:, 1:] * w  # (B, w)
        return (rows[:, :, None] & columns[:, None, :]).flatten(1)  # (B, N)


def checked_extents(pixels: Tensor, valid_extent: Sequence[Extent] | None) -> list[Extent]:
    """Check the extents against the pixels (B, 3, H, W); None means whole frames.

    Raises:
        ValueError: of another number than the pictures, or not 1..H rows and 1..W columns.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}.")
    batch, _, height, width = pixels.shape
    if valid_extent is None:
        return [(height, width)] * batch
    if len(valid_extent) != batch:
        raise ValueError(f"{batch} pictures need {batch} valid extents, got {len(valid_extent)}.")
    for index, (rows, columns) in enumerate(valid_extent):
        if int(rows) != rows or int(columns) != columns or not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(
                f"The valid extent {(rows, columns)} of picture {index} is not rows, columns in whole pixels "
                f"within 1..{height}, 1..{width}."
            )
    return [(int(rows), int(columns)) for rows, columns in valid_extent]


def build_vision_encoder(
    name_or_path: str | os.PathLike[str],
    side: int = 224,
    fit: Fit = "stretch",
    layer: int = -1,
    levels: Sequence[int] = (),
    weights: Weights = "load",
) -> VisionEncoder:
    """Build a frozen vision encoder.

    Args:
        name_or_path: a name of the zoo, a local Hugging Face folder, or a hub id ("facebook/dinov2-large").
        side: input side in pixels, divisible by the patch size.
        fit: "stretch" or "pad", see :class:`VisionEncoder`.
        layer: the layer whose patches are returned; -1 is the last, with its norm.
        levels: further layers to return.
        weights: "none" builds it on the meta device from its configuration alone.

    Raises:
        UnknownNameError: no such weights, or a kind of model that is not supported.
        ValueError: see :class:`VisionEncoder`.
    """
    if weights == "none":
        config = model_config(name_or_path)
        config = getattr(config, "vision_config", config)
        family = family_of(config)
        with torch.device("meta"):
            return VisionEncoder(family.model(config), family, side, fit, layer, levels)
    source = resolve(name_or_path)
    family = family_of(AutoConfig.from_pretrained(source))
    network = family.model.from_pretrained(source, attn_implementation="sdpa")
    return VisionEncoder(network, family, side, fit, layer, levels)
