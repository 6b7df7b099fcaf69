"""The frozen vision encoder that makes patch features out of images."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from lavis_svp.encoders.families import VisionFamily, family_of
from lavis_svp.encoders.frozen import FrozenModule
from lavis_svp.encoders.normalisation import with_own_colours
from lavis_svp.encoders.outputs import check_outputs, encode_patches
from lavis_svp.projectors.structures import PatchFeatures
from lavis_svp.zoo import Weights, model_config, resolve

Fit = Literal["stretch", "pad"]
Extent = tuple[int, int]
Side = int | Sequence[int]


class VisionEncoder(FrozenModule):
    """Patch features of a plain ViT; frozen.

    Args:
        network: a transformers vision model with an embedding per patch.
        family: how this kind of model wants its input and gives its output.
        side: input side in pixels, divisible by the patch size; or [height, width], with "stretch".
        fit: "stretch" stretches the image over the whole grid; "pad" keeps its aspect ratio, the rest of the grid
            being invalid patches.
        layer: which layer's patches are returned: -1 the last with the final norm; else the index of a hidden
            state, 0 being the embedding, negative from the end (-2 is LLaVA's choice for CLIP), without final norm;
            see :func:`lavis_svp.encoders.outputs.encode_patches`.
        levels: indices, as for ``layer``, of layers returned besides, as ``PatchFeatures.levels``.
        wants: further outputs, see :meth:`ask`.

    Raises:
        ValueError: a side that the patch size does not divide, or what :meth:`ask` refuses.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: PreTrainedModel,
        family: VisionFamily,
        side: Side = 224,
        fit: Fit = "stretch",
        layer: int = -1,
        levels: Sequence[int] = (),
        wants: Collection[str] = (),
    ) -> None:
        super().__init__()
        config = network.config
        if fit not in get_args(Fit):
            raise ValueError(f"Unknown fit '{fit}'. Known: {', '.join(get_args(Fit))}.")
        self.size = checked_size(side, config.patch_size, fit)
        self.network = network
        self.family = family
        self.dim: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self.grid = (self.size[0] // self.patch_size, self.size[1] // self.patch_size)
        self.fit = fit
        self.layer = layer
        self.ask(wants, levels)
        self.register_buffer("mean", torch.tensor(family.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(family.std).view(3, 1, 1), persistent=False)
        self.freeze()

    def ask(self, wants: Collection[str], levels: Sequence[int] = ()) -> None:
        """From now on give these further outputs.

        Args:
            wants: of ``lavis_svp.projectors.base.ENCODER_OUTPUTS``, what a projector ``requires``.
            levels: indices, as for ``layer``, of layers returned besides.

        Raises:
            ValueError: an unknown output, or one that this encoder's layer and levels do not allow.
        """
        check_outputs(self.network.config.num_hidden_layers, self.layer, levels, wants)
        self.levels, self.wants = tuple(levels), frozenset(wants)

    @torch.no_grad()
    def forward(self, pixels: Tensor, valid_extent: Sequence[Extent] | None = None) -> PatchFeatures:
        """Encode images.

        Args:
            pixels: (B, 3, H, W) RGB in [0, 1]; each image top-left in its frame, padding elsewhere.
            valid_extent: rows and columns of the frame, in pixels, that each image takes; None: all.

        Returns:
            Features of ``dim`` channels on the ``grid``, with what was asked for; a patch that shows nothing of the
            image is not valid.

        Raises:
            ValueError: extents that do not fit the pixels.
        """
        extents = checked_extents(pixels, valid_extent)
        return encode_patches(
            self.network,
            self.family,
            self.frame(pixels, extents),
            self._valid(extents, pixels),
            self.layer,
            self.levels,
            self.wants,
        )

    def frame(self, pixels: Tensor, extents: Sequence[Extent]) -> Tensor:
        """Normalise images and resize them (bilinear, antialiased) to the encoder's input.

        Args:
            pixels: (B, 3, H, W) RGB in [0, 1].
            extents: rows and columns that each image takes.

        Returns:
            (B, 3, *size); padding is 0, the mean colour.
        """
        framed = []
        for image, (height, width) in zip(pixels, extents, strict=True):
            shown = (image[:, :height, :width] - self.mean) / self.std  # (3, height, width)
            if self.fit == "pad":
                edge = max(pixels.shape[2:])
                shown = functional.pad(shown, (0, edge - width, 0, edge - height))  # (3, edge, edge)
            framed.append(functional.interpolate(shown[None], self.size, mode="bilinear", antialias=True))
        return torch.cat(framed)  # (B, 3, *size)

    def image_shares(self, pixels: Tensor, valid_extent: Sequence[Extent] | None = None) -> list[tuple[float, float]]:
        """The share of the grid's height and width that each image covers, as ``Superpixels.from_region_maps`` asks.

        Args:
            pixels: (B, 3, H, W), for its size alone.
            valid_extent: as for ``forward``.
        """
        extents = checked_extents(pixels, valid_extent)
        if self.fit == "stretch":
            return [(1.0, 1.0)] * len(extents)
        edge = max(pixels.shape[2:])
        return [(height / edge, width / edge) for height, width in extents]

    def _valid(self, extents: Sequence[Extent], pixels: Tensor) -> Tensor:
        """(B, N) bool: the patch shows some of the image."""
        h, w = self.grid
        shares = torch.tensor(self.image_shares(pixels, extents), device=pixels.device)
        rows = torch.arange(h, device=pixels.device) < shares[:, :1] * h  # (B, h)
        columns = torch.arange(w, device=pixels.device) < shares[:, 1:] * w  # (B, w)
        return (rows[:, :, None] & columns[:, None, :]).flatten(1)  # (B, N)


def checked_size(side: Side, patch: int, fit: Fit) -> tuple[int, int]:
    """Height and width in pixels of an encoder's input.

    Args:
        side: one for both, or [height, width].
        patch: side of a patch.
        fit: see :class:`VisionEncoder`.

    Raises:
        ValueError: not whole patches, not one or two whole numbers, or two different ones with "pad".
    """
    sides = (side, side) if isinstance(side, int) else tuple(side)
    if len(sides) != 2 or not all(isinstance(length, int) for length in sides):
        raise ValueError(f"The vision encoder's side must be a number of pixels or [height, width], got {side!r}.")
    for length in sides:
        if length < patch or length % patch:
            lower = max(length // patch, 1) * patch
            raise ValueError(
                f"The vision encoder's side {length} is not a multiple of its patch size {patch}. "
                f"The nearest are {lower} and {lower + patch}."
            )
    if fit == "pad" and sides[0] != sides[1]:
        raise ValueError(f"fit: pad needs a square input, but side is {list(sides)}: give one number, or fit: stretch.")
    return sides[0], sides[1]


def checked_extents(pixels: Tensor, valid_extent: Sequence[Extent] | None) -> list[Extent]:
    """Check the extents against the pixels (B, 3, H, W); None means whole frames.

    Raises:
        ValueError: of another number than the images, or not 1..H rows and 1..W columns.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}.")
    batch, _, height, width = pixels.shape
    if valid_extent is None:
        return [(height, width)] * batch
    if len(valid_extent) != batch:
        raise ValueError(f"{batch} images need {batch} valid extents, got {len(valid_extent)}.")
    for index, (rows, columns) in enumerate(valid_extent):
        if int(rows) != rows or int(columns) != columns or not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(
                f"The valid extent {(rows, columns)} of image {index} is not rows, columns in whole pixels "
                f"within 1..{height}, 1..{width}."
            )
    return [(int(rows), int(columns)) for rows, columns in valid_extent]


def build_vision_encoder(
    name_or_path: str | os.PathLike[str],
    side: Side = 224,
    fit: Fit = "stretch",
    layer: int = -1,
    levels: Sequence[int] = (),
    weights: Weights = "load",
    wants: Collection[str] = (),
) -> VisionEncoder:
    """Build a frozen vision encoder.

    Images are normalised as the ``preprocessor_config.json`` beside the weights says, without one as the family's
    publisher does.

    Args:
        name_or_path: a name of the zoo, a local Hugging Face folder, or a hub id ("facebook/dinov2-large"). Of a
            model of images and text (CLIP, SigLIP) the vision tower is taken.
        side: input side in pixels, divisible by the patch size; or [height, width].
        fit: "stretch" or "pad", see :class:`VisionEncoder`.
        layer: the layer whose patches are returned; -1 is the last, with its norm.
        levels: further layers to return.
        weights: "none" builds it on the meta device from its configuration alone.
        wants: further outputs, see :meth:`VisionEncoder.ask`.

    Raises:
        UnknownNameError: no such weights, or a kind of model that is not supported.
        ValueError: see :class:`VisionEncoder`.
    """
    if weights == "none":
        config = model_config(name_or_path)
        config = getattr(config, "vision_config", config)
        family = family_of(config)
        with torch.device("meta"):
            return VisionEncoder(family.model(config), family, side, fit, layer, levels, wants)
    source = resolve(name_or_path)
    family = with_own_colours(family_of(AutoConfig.from_pretrained(source)), source)
    network = family.model.from_pretrained(source, attn_implementation="sdpa")
    return VisionEncoder(network, family, side, fit, layer, levels, wants)
