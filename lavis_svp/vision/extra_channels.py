"""Extra channels in addition to the encoder's: what DINOv2 leaves out and the system has at no cost (not in the paper).

A frozen encoder trained to ignore colour or fine shape cannot name them afterwards. SAM's embedding is computed anyway,
for the superpixels and the mask, and the image's colours are there. Both are brought to the patch grid by area, so
every projector gets them, not only those that see superpixels. benchmarks/reports/learning.md has the measurement.

An image classifier's features, or its class probabilities, cost one more small network; they know real photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lavis_svp.common.tensors import no_autocast
from lavis_svp.common.transfer import Packed
from lavis_svp.vision.geometry import SamInputGeometry, scaled_pixels
from lavis_svp.vision.grid_places import Axes, Share, axes_of
from lavis_svp.vision.types import Grid, PatchFeatures

EXTRA_CHANNELS = {"sam": 256, "colour": 3, "classifier": 1280, "classes": 1000}
"""Names and their numbers of channels."""
OF_CLASSIFIER = frozenset({"classifier", "classes"})
"""Those that are made of the image classifier's features."""
COLOUR_MEAN, COLOUR_STD = 0.5, 0.25
"""Bring colours of 0..1 to about unit variance."""


def extra_width(names: Sequence[str]) -> int:
    """Number of channels that ``names`` append to a patch."""
    return sum(EXTRA_CHANNELS[name] for name in names)


@dataclass(frozen=True)
class ClassMaps:
    """What the channels ``classifier`` and ``classes`` are made of.

    Args:
        means: (B, N, 1280) the image classifier's features on the patch grids.
        log_probs: from mean features (..., 1280) to logarithms of class probabilities (..., 1000).
    """

    means: Tensor
    log_probs: Callable[[Tensor], Tensor]

    def channels(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``names`` that are made of the classifier: (B, N, A) float32 by name, of root mean square 1.

        ``classes`` are square roots of the probabilities of the patch's mean features: of length 1 whatever the image,
        without a logarithm's long tail of classes that are all improbable, and the likely ones still tell.
        """
        if not OF_CLASSIFIER & set(names):
            return {}
        means, made = self.means, {}
        if "classifier" in names:
            made["classifier"] = functional.layer_norm(means, means.shape[2:])
        if "classes" in names:
            log_probs = self.log_probs(means)  # (B, N, 1000)
            made["classes"] = (0.5 * log_probs).exp() * math.sqrt(log_probs.shape[2])
        return made


def append_channels(
    features: PatchFeatures,
    names: Sequence[str],
    sam: Tensor,
    pixels: Tensor | None,
    covered: Sequence[Share],
    colours: Tensor | None = None,
    axes: Mapping[str, Sequence[Axes]] | None = None,
    classes: ClassMaps | None = None,
) -> PatchFeatures:
    """Append channels to every patch, and so to each inner layer.

    They get the size of the patch's own channels (root mean square): projectors normalise all together, and SAM's
    embedding is 25 times smaller than DINOv2's features, so it would vanish.

    Args:
        features: patches (B, N, C) of images that all have the same grid.
        names: of :data:`EXTRA_CHANNELS`, in the order of the channels.
        sam: (B, 256, h, w) SAM's embeddings.
        pixels: (B, 3, S, S) RGB in SAM's input, uint8 or float in 0..1; None where ``colours`` are given or not needed.
        covered: for each image, the share of SAM's input that its patch grid covers.
        colours: (B, N, 3) of :func:`patch_colours`, where they are known already.
        axes: B area weights by the name of the channel, on the features' device; None: they are made here.
        classes: of the channels ``classifier`` and ``classes``; None where they are not among ``names``.

    Returns:
        features of width C + :func:`extra_width`.
    """
    if not names:
        return features
    groups, axes = [], axes or {}
    of_classes = {} if classes is None else classes.channels(names)
    for name in names:
        if name in OF_CLASSIFIER:
            group = of_classes[name]  # (B, N, 1280) or (B, N, 1000)
        elif name == "sam":
            group = on_grids(sam, axes.get("sam") or _moved_axes(sam, features.grids, covered))  # (B, N, 256)
            group = functional.layer_norm(group, group.shape[2:])
        elif colours is not None:
            group = colours.float()  # (B, N, 3)
        else:
            assert pixels is not None
            group = on_grids(
                _normalised(pixels), axes.get("colour") or _moved_axes(pixels, features.grids, covered)
            )  # (B, N, 3)
        groups.append(group)
    size = features.patches.square().mean(2, keepdim=True).sqrt()  # (B, N, 1)
    added = torch.cat(groups, dim=2).to(features.patches) * size  # (B, N, A)
    levels = features.levels
    if levels is not None:
        each = added[:, None].expand(-1, levels.shape[1], -1, -1)  # (B, L, N, A)
        levels = torch.cat([levels, each], dim=3)  # (B, L, N, C + A)
    return replace(features, patches=torch.cat([features.patches, added], dim=2), levels=levels)  # (B, N, C + A)


@dataclass(frozen=True)
class PatchColours:
    """Computes the channel ``colour`` of an image in a loader's worker, so that the image itself need not be sent.

    Args:
        grid: (h, w) patches of the vision encoder.
        padded: whether the grid covers all of SAM's input (``fit: pad``), not the image alone.
    """

    grid: Grid
    padded: bool

    def __call__(self, pixels: Tensor, geometry: SamInputGeometry) -> Tensor:
        """(N, 3) float32 of an image (3, S, S), uint8 or float in 0..1, in SAM's input, which lies as ``geometry``."""
        return patch_colours(pixels, self.grid, (1.0, 1.0) if self.padded else geometry.extent)


def patch_colours(pixels: Tensor, grid: Grid, covered: Share) -> Tensor:
    """The channel ``colour``: the mean RGB of each patch, by area, less ``COLOUR_MEAN``, divided by ``COLOUR_STD``.

    Args:
        pixels: (3, S, S) RGB in SAM's input, uint8 or float in 0..1.
        grid: (h, w) patches.
        covered: the share of SAM's input that the grid covers.

    Returns:
        (h * w, 3) float32.
    """
    return on_grid(_normalised(pixels), grid, covered)


def _normalised(pixels: Tensor) -> Tensor:
    return (scaled_pixels(pixels) - COLOUR_MEAN) / COLOUR_STD


def on_grid(channels: Tensor, grid: Grid, covered: Share) -> Tensor:
    """Mean of a map over each patch, by area, whether patches are larger or smaller than its pixels.

    Args:
        channels: (A, H, W) over SAM's input.
        grid: (h, w) patches.
        covered: the share of SAM's input that the grid covers.

    Returns:
        (h * w, A) float32.
    """
    return on_grids(channels[None], _moved_axes(channels[None], [grid], [covered]))[0]


def on_grids(channels: Tensor, axes: Sequence[Axes]) -> Tensor:
    """:func:`on_grid` of B maps (B, A, H, W) on grids of equal size, with their area weights: (B, h * w, A)."""
    with no_autocast(channels.device):
        means = [
            torch.einsum("hH,aHW,wW->hwa", rows, one.float(), columns).flatten(0, 1)  # (h * w, A)
            for one, (rows, columns) in zip(channels, axes, strict=True)
        ]
    return torch.stack(means)  # (B, h * w, A)


def _moved_axes(channels: Tensor, grids: Sequence[Grid], covered: Sequence[Share]) -> list[Axes]:
    """The area weights of B maps (B, A, H, W) on their device."""
    axes = axes_of(grids, covered, (channels.shape[2], channels.shape[3]))
    moved: list[Axes] = axes if channels.device.type == "cpu" else Packed(axes).to(channels.device).tree
    return moved
