"""Superpixels in one pass: a small head on SAM's embedding, a watershed, and a cut of the hierarchy that follows."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.devices import cpus_per_process, wait_for
from lavis_svp.common.files import one_line
from lavis_svp.common.tensors import no_autocast
from lavis_svp.common.transfer import to_device
from lavis_svp.superpixels.generator import SamEmbedding, SuperpixelGenerator, target_count
from lavis_svp.superpixels.one_pass.head import (
    AFFINITY_STRIDE,
    EMBEDDING_CHANNELS,
    EMBEDDING_STRIDE,
    STRIDE,
    BoundaryHead,
    boundary_strength,
)
from lavis_svp.superpixels.one_pass.hierarchy import Hierarchy, build_hierarchy
from lavis_svp.superpixels.one_pass.options import OnePassOptions, one_pass_options
from lavis_svp.superpixels.one_pass.weights import load_head
from lavis_svp.superpixels.region_map import RegionMap

BATCH = 16
"""Images that should come together, where a device is to be busy: their copy to the CPU is one."""

LARGEST_ENLARGED_SIDE = 512
"""Side of SAM's in pixels up to which :func:`label_scale` is 2."""

_SLACK = 1e-3  # by which rounding may take the image at stride 4 out of 0..1


def label_scale(side: int) -> int:
    """Pixels of the label map along a cell of the boundary strength, for an image at this side of SAM's.

    Up to side 512 the strength is enlarged twice, so that regions one cell wide survive. For the coarse regions of the
    labels of images held out of training the best union is .01 better for it, the best region .01 (mean over 10 to 100
    regions).
    """
    return 2 if side <= LARGEST_ENLARGED_SIDE else 1


class Boundaries(NamedTuple):
    """What the head says of one image of h_in x w_in pixels in SAM's input, without padding.

    Args:
        strength: (ceil(h_in / 4), ceil(w_in / 4)) float32 in 0..1, how strong a boundary runs through a cell.
        affinities: (D, ceil(h_in / 8), ceil(w_in / 8)) float32, see :class:`.head.HeadOutput`.
    """

    strength: np.ndarray
    affinities: np.ndarray


class OnePassSuperpixels(SuperpixelGenerator):
    """Superpixels that a boundary head reads off SAM's embedding, with no prompt and no pass of SAM's decoder.

    The head gives each cell of 4 x 4 pixels the strength of the boundary in it (:mod:`.head`). Basins of that map are
    the finest regions, and these merge across the weakest boundary, again and again (:mod:`.hierarchy`). The options
    say where to stop, so all maps of an image are nested. Every pixel has a region.

    The head runs in float32 on the device of the embeddings, the rest on the CPU, in threads where there are several
    images. A CPU takes the images one at a time, which is as fast and keeps the result from depending on the others;
    other devices take all of one side together, where that can change the strength by float noise. The host waits for
    the device once a call. The head is fixed, and no part of a model's state dict.

    Args:
        encoder_name: which image encoder makes the embeddings, or a function that says it when the settings are asked
            for; part of the settings.
        encoder_kind: what kind of encoder that is (``SamParts.name``); "" = what stands before the @ of its name, where
            the name is given. A head of another kind is warned of.
        options: fields of :class:`.options.OnePassOptions`.

    Raises:
        ValueError: an unknown option, or a value out of range.
        FileNotFoundError: no such head.
        BadFileError: the head's file is damaged, or holds something else.
    """

    name = "one_pass"
    needs_embedding = True
    needs_image = True

    def __init__(self, encoder_name: str | Callable[[], str] = "", encoder_kind: str = "", **options: Any) -> None:
        self.options = one_pass_options(options)
        self.encoder_name = encoder_name
        self.loaded = load_head(self.options.head)
        kind = encoder_kind or (encoder_name.partition("@")[0] if isinstance(encoder_name, str) else "")
        trained_for = one_line(self.loaded.facts.encoder)
        if kind and trained_for not in ("", kind):
            warnings.warn(
                f"The boundary head '{self.options.head}' was trained on embeddings of SAM's {trained_for}, but these "
                f"are {kind}'s: its superpixels will be poor. Train one with lavis-svp superpixels train and name its "
                "file as superpixels.head, or set superpixels.name to sam.",
                stacklevel=2,
            )
        self._heads: dict[torch.device, BoundaryHead] = {}

    def settings(self) -> dict[str, Any]:
        """Every option that changes the result, the encoder's name, and a digest of the head's weights."""
        if callable(self.encoder_name):
            self.encoder_name = self.encoder_name()
        identity = {"generator": self.name, "version": self.version, "encoder": self.encoder_name}
        return {**identity, "weights": self.loaded.digest, **self.options.settings()}

    @property
    def region_limit(self) -> int | None:
        """See :attr:`SuperpixelGenerator.region_limit`."""
        return self.options.max_superpixels

    @property
    def batch_size(self) -> int:
        """See :attr:`SuperpixelGenerator.batch_size`."""
        return BATCH

    def timed_batch(self, sources: Sequence[SamEmbedding]) -> tuple[list[RegionMap], dict[str, float]]:
        """See :meth:`SuperpixelGenerator.timed_batch`; the clock starts when the embeddings are there."""
        for device in {one.embedding.device for one in sources}:
            wait_for(device)
        return super().timed_batch(sources)

    def segment_batch(self, sources: Sequence[SamEmbedding]) -> list[RegionMap]:
        """Make the superpixels of several images.

        Returns:
            Maps of the size of their hierarchies, :func:`label_scale` times ceil(h_in / 4) x ceil(w_in / 4); where h_in
            or w_in is no multiple of 4, the last cells reach less than a cell into the padding.

        Raises:
            ValueError: an embedding or an image at stride 4 has another shape than SAM's, or is not finite.
        """
        return [self._cut(hierarchy, self.options) for hierarchy in self.hierarchies(sources)]

    def at_granularities(self, embedding: SamEmbedding, granularities: Sequence[float]) -> list[RegionMap]:
        """Make one image's superpixels at several values of ``granularity``: cuts of one hierarchy.

        Args:
            embedding: of the image.
            granularities: each from 0 to 1, see :class:`.options.OnePassOptions`.

        Raises:
            ValueError: as :meth:`segment_batch`, or a value out of range.
        """
        options = [replace(self.options, granularity=value) for value in granularities]
        (hierarchy,) = self.hierarchies([embedding])
        return [self._cut(hierarchy, one) for one in options]

    def at_counts(self, embedding: SamEmbedding, counts: Sequence[int]) -> list[RegionMap]:
        """Make one image's superpixels at several numbers of regions: cuts of one hierarchy.

        Args:
            embedding: of the image.
            counts: each at least 1; there are fewer regions where the hierarchy has no more. ``min_strength``,
                ``granularity`` and ``max_superpixels`` do not count.

        Raises:
            ValueError: as :meth:`segment_batch`, or a count below 1.
        """
        if any(count < 1 for count in counts):
            raise ValueError(f"An image has at least 1 superpixel, but counts is {list(counts)}.")
        (hierarchy,) = self.hierarchies([embedding])
        return [RegionMap.from_labels(hierarchy.cut(count)) for count in counts]

    def hierarchies(self, embeddings: Sequence[SamEmbedding]) -> list[Hierarchy]:
        """The nested regions of several images, of which each map is a cut.

        Raises:
            ValueError: as :meth:`segment_batch`.
        """
        found = self.boundaries(embeddings)
        scales = [label_scale(one.side) for one in embeddings]
        if len(found) < 2:
            return list(map(_hierarchy, found, scales))
        with ThreadPoolExecutor(min(len(found), cpus_per_process())) as pool:
            return list(pool.map(_hierarchy, found, scales))

    @torch.inference_mode()
    def boundaries(self, embeddings: Sequence[SamEmbedding]) -> list[Boundaries]:
        """Run the head on several images.

        Raises:
            ValueError: as :meth:`segment_batch`.
        """
        for embedding in embeddings:
            _check(embedding)
        if not embeddings:
            return []
        device = embeddings[0].embedding.device
        groups = _groups(embeddings, alone=device.type == "cpu")
        with no_autocast(device), _exact_convolutions(device):
            outputs = [self._run(device, [embeddings[index] for index in group]) for group in groups]
        on_cpu = _in_one_copy([tensor for output in outputs for tensor in output])
        found: dict[int, Boundaries] = {}
        for group in groups:
            checks, strength, affinities = next(on_cpu), next(on_cpu), next(on_cpu)
            for position, index in enumerate(group):
                _check_values(checks[position])
                size = embeddings[index].input_size
                height, width = (-(-length // STRIDE) for length in size)
                low_height, low_width = (-(-length // AFFINITY_STRIDE) for length in size)
                found[index] = Boundaries(
                    strength[position, :height, :width], affinities[position, :, :low_height, :low_width]
                )
        return [found[index] for index in range(len(embeddings))]

    def _run(self, device: torch.device, embeddings: Sequence[SamEmbedding]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the head on images of one side.

        Returns:
            (B, 2) float32, how many values of the embedding are not finite, and of the image out of range; (B, 4 h,
            4 w) strength; (B, D, 2 h, 2 w) affinities.
        """
        layout = _layout(device)
        embedding = torch.stack([one.embedding for one in embeddings]).float()  # (B, 256, h, w)
        images = [one.image for one in embeddings if one.image is not None]
        image = to_device(torch.stack(images), device).float()  # (B, 3, 4 h, 4 w)
        output = self._head(device)(embedding.contiguous(memory_format=layout), image.contiguous(memory_format=layout))
        infinite = (~embedding.isfinite()).flatten(1).sum(1)  # (B,)
        outside = (~((image >= -_SLACK) & (image <= 1 + _SLACK))).flatten(1).sum(1)  # (B,) NaN are outside
        checks = torch.stack([infinite, outside], dim=1).float()  # (B, 2)
        return checks, boundary_strength(output.boundaries), output.affinities

    def _head(self, device: torch.device) -> BoundaryHead:
        """The head on a device, a copy that is made once for each."""
        if device not in self._heads:
            with torch.inference_mode(False):  # the copies outlive the call
                head = copy.deepcopy(self.loaded.head)
                self._heads[device] = head.to(device).to(memory_format=_layout(device))
        return self._heads[device]

    @staticmethod
    def _cut(hierarchy: Hierarchy, options: OnePassOptions) -> RegionMap:
        finest = hierarchy.count_at(options.min_strength)
        return RegionMap.from_labels(hierarchy.cut(target_count(finest, options)))


def _hierarchy(boundaries: Boundaries, scale: int) -> Hierarchy:
    return build_hierarchy(boundaries.strength, boundaries.affinities, scale)


def _groups(embeddings: Sequence[SamEmbedding], alone: bool) -> list[list[int]]:
    """The numbers of the images that go through the head together: each alone, or those of one side."""
    if alone:
        return [[index] for index in range(len(embeddings))]
    groups: dict[int, list[int]] = {}
    for index, embedding in enumerate(embeddings):
        groups.setdefault(embedding.side, []).append(index)
    return list(groups.values())


def _in_one_copy(tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """Float32 tensors as arrays on the CPU; the host waits for their device once."""
    values = torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()
    for tensor in tensors:
        part, values = np.split(values, [tensor.numel()])
        yield part.reshape(tuple(tensor.shape))  # of the tensor


def _layout(device: torch.device) -> torch.memory_format:
    """How tensors lie in memory: on a CPU channels last, which takes two thirds of the time at side 1024."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def _exact_convolutions(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which CUDA's float32 convolutions are that, without TF32, and always the same."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def _check(embedding: SamEmbedding) -> None:
    """Compare shapes with those that SAM's side gives; values are checked on the device (:func:`_check_values`)."""
    side, cells = embedding.side, embedding.side // EMBEDDING_STRIDE
    if tuple(embedding.embedding.shape) != (EMBEDDING_CHANNELS, cells, cells):
        raise ValueError(
            f"SAM's embedding of an image at side {side} is ({EMBEDDING_CHANNELS}, {cells}, {cells}), "
            f"got {tuple(embedding.embedding.shape)}."
        )
    image, size = embedding.image, (3, cells * EMBEDDING_STRIDE // STRIDE, cells * EMBEDDING_STRIDE // STRIDE)
    if image is None or tuple(image.shape) != size or not image.is_floating_point():
        got = "none" if image is None else f"{tuple(image.shape)} {image.dtype}"
        raise ValueError(f"The image at stride {STRIDE} of side {side} is {size} float RGB in 0..1, got {got}.")
    height, width = embedding.input_size
    if not (0 < height <= side and 0 < width <= side):
        raise ValueError(f"input_size {embedding.input_size} does not lie within SAM's {side} x {side} frame.")


def _check_values(checks: np.ndarray) -> None:
    infinite, outside = map(int, checks)
    if infinite:
        raise ValueError(
            f"SAM's embedding holds {infinite} NaN or infinite values: the image's pixels do, or the image encoder "
            "exceeded the range of its number type (run it in float32 or bfloat16)."
        )
    if outside:
        raise ValueError(
            f"The image at stride {STRIDE} holds {outside} values that are NaN or not within 0..1: divide uint8 by 255."
        )
