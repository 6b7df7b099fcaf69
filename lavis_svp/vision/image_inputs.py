"""What the feature extractor reads of a batch: images, cached features, superpixels; checked and stacked on the CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lavis_svp.common.transfer import to_device
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.backbone import Fit, image_shares
from lavis_svp.vision.classifier import classifier_axes
from lavis_svp.vision.geometry import VALID_CHANNEL, SamInputGeometry, geometry_of, read_geometry, validity_sums
from lavis_svp.vision.grid_places import GridPlaces, grid_places
from lavis_svp.vision.sam import STRIDE
from lavis_svp.vision.types import CLASSIFIER, Grid

RANGE_TOLERANCE = 0.01  # by which an image in floats may leave 0..1: rounding in 16 bits, antialiasing


@dataclass
class ImageInputs:
    """What the extractor reads of B images, made by :func:`read_images` on the CPU, without weights.

    Args:
        pixels: (B, 3, S, S) RGB in SAM's input, zeros in the padding; uint8, or float in 0..1. None: all that the model
            reads of the images was computed before.
        geometry: where each image lies in SAM's input.
        cached: the features of all images: ``patches`` (B, N, C), ``valid`` (B, N) bool, ``sam`` (B, 256, h, w), the
            requested outputs (``classifier`` as large as the largest image needs), and ``colour`` (B, N, 3) of
            :func:`.patch_colours`; None: none.
        region_maps: the superpixels of each image; None: none.
        regions_known: whether nobody reads the region maps any more, because all that is made of them is known; they
            are then neither sent nor made.
        places: where each image lies on its patch grid, and the area weights of the extra channels that are maps;
            None: not known yet.
        errors: what is wrong with an image, by its index: zeros stand in its place, so that the others are computed.
    """

    pixels: Tensor | None
    geometry: list[SamInputGeometry]
    cached: dict[str, Tensor] | None
    region_maps: list[RegionMap] | None
    regions_known: bool = False
    places: GridPlaces | None = None
    errors: dict[int, str] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> ImageInputs:
        """The same with its tensors on ``device``."""
        pixels = None if self.pixels is None else to_device(self.pixels, device)
        cached = None if self.cached is None else {name: to_device(one, device) for name, one in self.cached.items()}
        places = None if self.places is None else self.places.to(device)
        return dataclasses.replace(self, pixels=pixels, cached=cached, places=places)

    def placed(
        self, grid: Grid, fit: Fit, extra_channels: Sequence[str], classifier_side: int | None = None
    ) -> ImageInputs:
        """The same with their ``places`` on an encoder's (h, w) ``grid``.

        Args:
            grid: of the encoder.
            fit: its option, and likewise the next one.
            extra_channels: whose area weights are made.
            classifier_side: the image classifier's; None: its area weights are not made here.
        """
        side = self.geometry[0].side
        maps = {"sam": side // STRIDE} if "sam" in extra_channels else {}
        if "colour" in extra_channels and "colour" not in (self.cached or {}):
            maps["colour"] = side
        extents = image_shares([one.input_size for one in self.geometry], (side, side), fit)
        covered = [(1.0, 1.0) if fit == "pad" else one.extent for one in self.geometry]
        grids = [grid] * len(extents)
        places = grid_places(self.geometry, extents, grids, covered, maps)
        if classifier_side is not None:
            places.axes[CLASSIFIER] = classifier_axes(self.geometry, grids, fit, classifier_side)
        return dataclasses.replace(self, places=places)


def read_images(
    samples: Mapping[str, Any],
    side: int,
    outputs: Sequence[str] = (),
    extra_channels: Sequence[str] = (),
    keep_broken: bool = False,
) -> ImageInputs:
    """Read what the extractor needs of a batch; images that nothing needs are left out.

    Args:
        samples: ``image``, either (B, 3, S, S) uint8 with ``original_size`` or ``input_size`` beside it, or
            (B, 4, S, S) float, RGB in 0..1 and a channel that is 1 on the image; optional where the features are
            cached. Optional lists: ``frozen`` (cached features, and ``colour``), ``region_map`` (superpixels),
            ``original_size`` and ``input_size``, (H, W) of each image itself and in SAM's input.
        side: S, SAM's input side in pixels.
        outputs: those of :meth:`.FrozenFeatureExtractor.request_outputs`.
        extra_channels: of :data:`EXTRA_CHANNELS`.
        keep_broken: for predictions: an image with NaN or infinite numbers in its pixels or cached features is replaced
            by zeros, and its entry in ``errors`` says so.

    Raises:
        ValueError: no image, images of another size than ``side``, type or range; no image and no features, or features
            without one of ``outputs``; more or fewer entries of a list than images; or NaN or infinite numbers in an
            image, unless ``keep_broken``.
    """
    image, region_maps = samples.get("image"), samples.get("region_map")
    region_maps = list(region_maps) if region_maps is not None and all(one is not None for one in region_maps) else None
    cached = _stacked(samples.get("frozen"), outputs, extra_channels)
    pixels, geometry, not_finite = _read_pixels(image, samples.get("original_size"), samples.get("input_size"), side)
    if not geometry:
        raise ValueError("The batch has no images.")
    for key in ("region_map", "frozen"):
        if samples.get(key) is not None and len(samples[key]) != len(geometry):
            raise ValueError(f"There are {len(geometry)} images, but {len(samples[key])} entries in {key}.")
    errors = {index: f"{_name(samples, index)} has NaN or infinite pixels" for index in not_finite}
    for index in _not_finite(cached) if keep_broken else ():  # half a millisecond an image, too much for training
        errors[index] = f"{_name(samples, index)} has NaN or infinite cached features"
    if errors and not keep_broken:
        raise ValueError("; ".join(errors.values()) + ". Compute them again, or leave the image out.")
    if cached is not None:
        for index in errors:
            for tensor in (cached[name] for name in cached if name != "valid"):
                tensor[index] = 0  # they were stacked just now: nobody else's
    has_colour = "colour" not in extra_channels or (cached is not None and "colour" in cached)
    if cached is not None and has_colour and region_maps is not None:
        pixels = None
    if pixels is None and (cached is None or not has_colour):
        lacking = "features" if cached is None else "colours"
        raise ValueError(
            f"The samples hold no images, and their {lacking} are not cached: let the data set load images."
        )
    return ImageInputs(pixels, geometry, cached, region_maps, errors=errors)


def _name(samples: Mapping[str, Any], index: int) -> str:
    """An image's name in a message: its place in the batch, and its file where the samples say it."""
    files: Any = samples.get("file_name")
    known = isinstance(files, list | tuple) and index < len(files)
    return f"Image {index} of the batch" + (f" ({files[index]})" if known else "")


def _not_finite(cached: Mapping[str, Tensor] | None) -> list[int]:
    """The images whose cached features hold NaN or infinite numbers: their sums tell."""
    if cached is None:
        return []
    floats = [one for one in cached.values() if one.is_floating_point()]
    sums = [torch.stack([image.sum(dtype=torch.float32) for image in one]) for one in floats]  # whole: 50 times faster
    return [index for index, total in enumerate(torch.stack(sums).sum(0).tolist()) if not math.isfinite(total)]


def _stacked(
    entries: Sequence[Mapping[str, Any] | None] | None, outputs: Sequence[str], extra_channels: Sequence[str]
) -> dict[str, Tensor] | None:
    """Stack the cached features of all images; None unless all of them have some."""
    found = [entry for entry in entries or () if entry is not None]
    if not found or len(found) < len(entries or ()):
        return None
    names = ["patches", "valid", "sam", *outputs]
    if lacking := [name for name in names if any(name not in entry for entry in found)]:
        raise ValueError(
            f"The projector needs {' and '.join(lacking)}, which the cached features lack. They were "
            "computed for another projector: remove them, or fill a cache with this model "
            "(model.cache_features: true)."
        )
    if "colour" in extra_channels and all(entry.get("colour") is not None for entry in found):
        names.append("colour")
    tensors = {name: [torch.as_tensor(entry[name]) for entry in found] for name in names}
    if CLASSIFIER in tensors:
        tensors[CLASSIFIER] = _equally_large(tensors[CLASSIFIER])
    for name, rows in tensors.items():
        if len(shapes := {tuple(row.shape) for row in rows}) > 1:
            raise ValueError(f"The cached features of a batch have {name} of different shapes: {sorted(shapes)}.")
    return {name: torch.stack(rows) for name, rows in tensors.items()}


def _equally_large(maps: list[Tensor]) -> list[Tensor]:
    """Maps (C, h, w) with zeros at the bottom and on the right, so that all get the size of the largest."""
    if any(one.ndim != 3 for one in maps):
        return maps
    rows, columns = (max(one.shape[axis] for one in maps) for axis in (1, 2))
    return [functional.pad(one, (0, columns - one.shape[2], 0, rows - one.shape[1])) for one in maps]


def _read_pixels(
    image: Tensor | None, original_sizes: Any, input_sizes: Any, side: int
) -> tuple[Tensor | None, list[SamInputGeometry], list[int]]:
    """The RGB of an image tensor in either form, where the images lie in SAM's input, and which are not finite.

    An image that is not finite is replaced by zeros that fill SAM's input.
    """
    if image is None:
        return None, geometry_of(side, original_sizes, input_sizes), []
    _check_image(image, side)
    if image.dtype == torch.uint8:
        geometry = geometry_of(side, original_sizes, input_sizes)
        if len(geometry) != len(image):
            raise ValueError(f"There are {len(image)} images, but {len(geometry)} entries in original_size.")
        return image, geometry, []
    return _read_floats(image.float(), original_sizes)  # 16 bits cannot count a thousand valid pixels


def _check_image(image: Any, side: int) -> None:
    kind, fits = type(image).__name__, False
    if isinstance(image, Tensor):
        kind = f"{tuple(image.shape)} {image.dtype} {image.layout} on {image.device}"
        channels = VALID_CHANNEL if image.dtype == torch.uint8 else VALID_CHANNEL + 1
        known = image.dtype == torch.uint8 or image.is_floating_point()
        dense = image.layout == torch.strided and not image.is_meta
        fits = known and dense and tuple(image.shape[1:]) == (channels, side, side)
    if not fits:
        raise ValueError(
            f"image must be (B, 4, {side}, {side}) float or (B, 3, {side}, {side}) uint8 from the svp_image processors "
            f"with image_size {side} (= model.sam.side), got {kind}."
        )


def _read_floats(image: Tensor, original_sizes: Any) -> tuple[Tensor, list[SamInputGeometry], list[int]]:
    """What :func:`_read_pixels` gives of images (B, 4, S, S); from a device in one transfer."""
    rgb, side = image[:, :VALID_CHANNEL], image.shape[-1]
    if not len(image):
        return rgb, [], []
    extremes = torch.stack([torch.stack(one.aminmax()) for one in image])  # (B, 2), NaN where there is any
    sums, not_finite = [], []
    numbers = torch.cat([extremes, validity_sums(image[:, VALID_CHANNEL])], dim=1)  # (B, 5)
    for index, (low, high, *own_sums) in enumerate(numbers.tolist()):
        if not (math.isfinite(low) and math.isfinite(high)):
            not_finite.append(index)
            own_sums = [side, side, side * side]
        elif low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(
                f"A float image must lie in 0..1, image {index} of the batch spans {low:.4g} to {high:.4g}. Take it "
                "from the svp_image processors, or divide 0..255 by 255; the encoders' own normalisation comes later."
            )
        sums.append(own_sums)
    if not_finite:
        rgb = rgb.index_fill(0, torch.tensor(not_finite, device=rgb.device), 0.0)
    return rgb, read_geometry(sums, side, original_sizes), not_finite
