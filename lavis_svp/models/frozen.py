"""The frozen half of the model: what training never changes about an image, computed or taken from a cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavis_svp.common.checkpoints import content_digest
from lavis_svp.common.options import plain
from lavis_svp.encoders import build_sam, build_vision_encoder
from lavis_svp.encoders.families import family_of
from lavis_svp.encoders.frame import VALID_CHANNEL
from lavis_svp.encoders.sam import sam_identity
from lavis_svp.heads.mask_head import Frame
from lavis_svp.models.beside import append_channels, extra_width
from lavis_svp.models.options import EncoderOptions, SamOptions
from lavis_svp.projectors.structures import PatchFeatures
from lavis_svp.superpixels import RegionMap, SamEmbedding, build_superpixels, list_superpixels
from lavis_svp.zoo import Weights


@dataclass
class VisionFeatures:
    """What the trained half needs to know of B images.

    Args:
        features: patch features.
        sam: (B, 256, h, w) SAM embeddings.
        region_maps: superpixels of each image; None when the projector needs none.
        frames: where each image lies in SAM's frame.
        extents: share (of height, of width) of the patch grid that each image covers.
    """

    features: PatchFeatures
    sam: Tensor
    region_maps: list[RegionMap] | None
    frames: list[Frame]
    extents: list[tuple[float, float]]

    def sam_embedding(self, index: int) -> SamEmbedding:
        """SAM's embedding of one image as the superpixel generator takes it."""
        frame = self.frames[index]
        return SamEmbedding(self.sam[index], frame.input_size, frame.original_size, frame.side)


@dataclass(frozen=True)
class ExtractorConfig:
    """What a :class:`FrozenFeatureExtractor` is built from; hashable, and small to send to another process.

    Args:
        encoder: which vision encoder.
        sam: which SAM.
        superpixels: name and options of the generator as JSON; None = no superpixels.
        wants: what the vision encoder gives besides patches, see :meth:`FrozenFeatureExtractor.ask`.
    """

    encoder: EncoderOptions
    sam: SamOptions
    superpixels: str | None
    wants: frozenset[str] = frozenset()

    def build(self) -> FrozenFeatureExtractor:
        """Load the weights."""
        superpixels = None if self.superpixels is None else json.loads(self.superpixels)
        frozen = FrozenFeatureExtractor(self.encoder, self.sam, superpixels)
        frozen.ask(self.wants)
        return frozen


class FrozenFeatureExtractor(nn.Module):
    """Vision encoder, SAM image encoder and superpixel generator behind one call; nothing in it trains.

    SAM's image encoder runs once per image: its embedding makes SAM superpixels and, later, the mask.

    Args:
        encoder: which vision encoder.
        sam: which SAM.
        superpixels: see :func:`generator_options`; None when the projector needs no superpixels.
        weights: "none" builds it on the meta device.
    """

    def __init__(
        self,
        encoder: EncoderOptions,
        sam: SamOptions,
        superpixels: Mapping[str, Any] | None,
        weights: Weights = "load",
    ) -> None:
        super().__init__()
        self.recipe = ExtractorConfig(encoder, sam, None if superpixels is None else json.dumps(plain(superpixels)))
        self.fit = encoder.fit
        self.side = sam.side
        self.vision_encoder = build_vision_encoder(
            encoder.name, side=encoder.side, fit=encoder.fit, layer=encoder.layer, weights=weights
        )
        parts = build_sam(sam.name, side=sam.side, weights=weights)
        self.sam_encoder = parts.encoder
        self.sam_prompt_encoder, self.sam_mask_decoder = parts.prompt_encoder, parts.mask_decoder
        self.requires_grad_(False)
        self.generator = None
        if superpixels is not None:
            name, options = generator_options(superpixels)
            modules = {
                "prompt_encoder": parts.prompt_encoder,
                "mask_decoder": parts.mask_decoder,
                "encoder_name": sam_identity(parts),
            }
            self.generator = build_superpixels(name, **options, **(modules if name == "sam" else {}))

    @property
    def patch_dim(self) -> int:
        """C, channels of a patch as projectors get it: the encoder's, and those put beside them."""
        return self.vision_encoder.dim + extra_width(self.recipe.encoder.beside)

    def ask(self, wants: Collection[str]) -> None:
        """From now on give these outputs of the vision encoder besides the patches.

        Args:
            wants: what the projector ``requires``, of ``ENCODER_OUTPUTS``.

        Raises:
            ValueError: the encoder cannot give one; the message says which key of the YAML to set.
        """
        self.vision_encoder.ask(wants, self.recipe.encoder.levels if "levels" in wants else ())
        self.recipe = dataclasses.replace(self.recipe, wants=frozenset(wants))

    def extras(self, features: PatchFeatures) -> dict[str, Tensor]:
        """The optional fields of ``features`` that were asked for, by name."""
        return {name: getattr(features, name) for name in sorted(self.recipe.wants)}

    def train(self, mode: bool = True) -> FrozenFeatureExtractor:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def settings(self) -> dict[str, Any]:
        """What the cached features depend on, JSON-able: the options, and digests of the weights behind their names.

        What makes no difference is left out, so that a cache filled before an option existed stays valid.
        """
        encoder, sam = dataclasses.asdict(self.recipe.encoder), self.recipe.sam
        encoder["side"] = list(self.vision_encoder.size) if not isinstance(encoder["side"], int) else encoder["side"]
        levels, wants = encoder.pop("levels"), sorted(self.recipe.wants)
        del encoder["beside"]  # added to what the cache holds
        if wants:
            encoder["wants"] = wants
        if "levels" in wants:
            encoder["levels"] = list(levels)
        family, usual = self.vision_encoder.family, family_of(self.vision_encoder.network.config)
        if (family.mean, family.std) != (usual.mean, usual.std):
            encoder["mean"], encoder["std"] = list(family.mean), list(family.std)
        weights = {
            "vision_encoder": content_digest(self.vision_encoder.state_dict()),
            "sam_encoder": content_digest(self.sam_encoder.state_dict()),
        }
        return {"vision_encoder": encoder, "sam": {"name": sam.name, "side": sam.side}, "weights": weights}

    @torch.no_grad()
    def encode(self, image: Tensor, original_sizes: Sequence[Any] | None) -> VisionFeatures:
        """Run both encoders; no superpixels.

        Args:
            image: (B, 4, S, S) on this module's device.
            original_sizes: B sizes (H, W) of the images; None = their size in SAM's frame.

        Raises:
            ValueError: a tensor that ``svp_image_train``/``svp_image_eval`` did not make.
        """
        frames, extents = self._places(image, original_sizes)
        features = self.vision_encoder(image[:, :VALID_CHANNEL], [frame.input_size for frame in frames])
        sam = self.sam_encoder(image[:, :VALID_CHANNEL], image[:, VALID_CHANNEL:]).float()
        return VisionFeatures(features, sam, None, frames, extents)

    @torch.no_grad()
    def forward(self, samples: Mapping[str, Any]) -> VisionFeatures:
        """Compute or collect the frozen inputs.

        Args:
            samples: ``image`` (B, 4, S, S) on this module's device; optional lists ``frozen`` (cached features),
                ``region_map`` (cached superpixels) and ``original_size``.

        Raises:
            ValueError: a tensor that ``svp_image_train``/``svp_image_eval`` did not make.
        """
        image, cached = samples["image"], samples.get("frozen")
        if cached is not None and all(entry is not None for entry in cached):
            frames, extents = self._places(image, samples.get("original_size"))
            sam = torch.stack([torch.as_tensor(entry["sam"]) for entry in cached]).to(image.device).float()
            inputs = VisionFeatures(self._cached_features(cached, image.device), sam, None, frames, extents)
        else:
            inputs = self.encode(image, samples.get("original_size"))
        inputs.region_maps = self._region_maps(samples, image, inputs)
        return dataclasses.replace(inputs, features=self.beside(inputs, image))

    def beside(self, inputs: VisionFeatures, image: Tensor) -> PatchFeatures:
        """The features with the channels that ``vision_encoder.beside`` names.

        Args:
            inputs: of the encoders.
            image: (B, 4, S, S).
        """
        places = [(frame.input_size[0] / self.side, frame.input_size[1] / self.side) for frame in inputs.frames]
        covered = [(1.0, 1.0)] * len(places) if self.fit == "pad" else places
        names = self.recipe.encoder.beside
        return append_channels(inputs.features, names, inputs.sam, image[:, :VALID_CHANNEL], covered)

    def _places(
        self, image: Tensor, original_sizes: Sequence[Any] | None
    ) -> tuple[list[Frame], list[tuple[float, float]]]:
        if image.ndim != 4 or image.shape[1:] != (4, self.side, self.side):
            raise ValueError(
                f"image must be (B, 4, {self.side}, {self.side}) from the svp_image processors with "
                f"image_size {self.side} (= model.sam.side), got {tuple(image.shape)}."
            )
        frames = image_frames(image[:, VALID_CHANNEL], original_sizes)
        covered = [(f.input_size[0] / self.side, f.input_size[1] / self.side) for f in frames]
        return frames, covered if self.fit == "pad" else [(1.0, 1.0)] * len(frames)

    def _cached_features(self, cached: Sequence[Mapping[str, Any]], device: torch.device) -> PatchFeatures:
        patches = torch.stack([torch.as_tensor(entry["patches"]) for entry in cached]).to(device).float()
        valid = torch.stack([torch.as_tensor(entry["valid"]) for entry in cached]).to(device)
        features = PatchFeatures(patches=patches, grids=[self.vision_encoder.grid] * len(cached), valid=valid.bool())
        return dataclasses.replace(features, **self._cached_extras(cached, device))

    def _cached_extras(self, cached: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
        extras = {}
        for name in sorted(self.recipe.wants):
            if any(name not in entry for entry in cached):
                raise ValueError(
                    f"The projector needs {name}, which the given frozen features lack. They were made for another "
                    "projector: leave them out, or fill a cache with this model (model.cache_frozen: true)."
                )
            extras[name] = torch.stack([torch.as_tensor(entry[name]) for entry in cached]).to(device).float()
        return extras

    def _region_maps(self, samples: Mapping[str, Any], image: Tensor, inputs: VisionFeatures) -> list[RegionMap] | None:
        given = samples.get("region_map")
        if given is not None and all(region_map is not None for region_map in given):
            return list(given)
        if self.generator is None:
            return None
        if self.generator.needs_embedding:
            return self.generator(None, [inputs.sam_embedding(index) for index in range(len(inputs.frames))])
        return self.generator([image_pixels(pixels, f) for pixels, f in zip(image, inputs.frames, strict=True)])


def generator_options(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The generator that a ``superpixels`` section names, and the options that are meant for it.

    Args:
        section: ``name``, options, and sections named like generators, which hold options for the case that this
            generator is chosen; so changing ``name`` alone is enough to swap it.
    """
    own = {known: section[known] for known in list_superpixels() if known in section}
    options = {key: value for key, value in section.items() if key != "name" and key not in own}
    return section["name"], {**own.get(section["name"], {}), **options}


def image_frames(valid: Tensor, original_sizes: Sequence[Any] | None) -> list[Frame]:
    """Read each image's place from the validity channel.

    Args:
        valid: (B, S, S) 1 where the image is, top-left.
        original_sizes: B sizes (H, W); None = the size within SAM's frame.

    Raises:
        ValueError: an image without a valid pixel.
    """
    frames = []
    for index, channel in enumerate(valid):
        input_size = (int(channel[:, 0].sum()), int(channel[0].sum()))
        if min(input_size) < 1:
            raise ValueError(f"Image {index} has no valid pixel in its fourth channel.")
        height, width = input_size if original_sizes is None else original_sizes[index]
        frames.append(Frame(channel.shape[-1], input_size, (int(height), int(width))))
    return frames


def image_pixels(image: Tensor, frame: Frame) -> np.ndarray:
    """(4, S, S) image tensor -> (h_in, w_in, 3) uint8 image without its padding."""
    inside = image[:VALID_CHANNEL, : frame.input_size[0], : frame.input_size[1]]
    return (inside.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
