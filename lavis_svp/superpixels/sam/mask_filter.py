"""Which of SAM's masks become superpixels: quality tests on the device, then NMS, clean-up and containment on the host.

The order of the types is the way of a mask: :class:`DecodedMasks` (logits) -> :class:`ScoredMasks` (verdicts and packed
pixels) -> :class:`Candidates` (on the host, only those that passed) -> :class:`ChosenMasks` (what goes into the region
map). In all of them ``ious`` is SAM's predicted IoU, ``levels`` is 0 subpart, 1 part, 2 whole, and ``points`` is the
number of the prompt; (point, level) is unique within an image and breaks ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score, remove_small_regions
from torch import Tensor

from lavis_svp.common.transfer import to_device
from lavis_svp.superpixels.sam.options import LEVELS, SamSuperpixelOptions

_BITS = 8


class DecodedMasks(NamedTuple):
    """The decoder's m masks over the image only, without padding, and whether SAM predicts a high enough IoU."""

    logits: Tensor  # (m, h, w) float32
    passes_iou: Tensor  # (m,) bool
    ious: Tensor  # (m,) float32
    levels: Tensor  # (m,) int64
    points: Tensor  # (m,) int64


class ScoredMasks(NamedTuple):
    """Whether each of m masks passes all tests, and the fields of :class:`Candidates`."""

    passes: Tensor  # (m,) bool
    packed: Tensor
    areas: Tensor
    boxes: Tensor
    ious: Tensor
    levels: Tensor
    points: Tensor


_ARRAYS = ScoredMasks._fields[1:]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The masks of an image that passed the quality tests, on the host.

    Args:
        packed: (M, h, ceil(w / 8)) uint8, as numpy.packbits packs rows; over the image only, no padding.
        areas: (M,) int64 pixels.
        boxes: (M, 4) int64 x0, y0, x1, y1 of the outermost pixels, inclusive, as in segment_anything.
        ious: (M,) float64.
        levels: (M,) int64.
        points: (M,) int64.
        width: w.
    """

    packed: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    ious: np.ndarray
    levels: np.ndarray
    points: np.ndarray
    width: int

    def __len__(self) -> int:
        return len(self.areas)

    def take(self, index: np.ndarray) -> Candidates:
        """The candidates at ``index``, in that order."""
        return replace(self, **{name: getattr(self, name)[index] for name in _ARRAYS})

    def masks(self) -> np.ndarray:
        """Unpack the masks: (M, h, w) bool."""
        return np.unpackbits(self.packed, axis=2, count=self.width).astype(bool)

    def covered(self) -> np.ndarray:
        """The pixels that lie in some mask, (h, w) bool."""
        union = np.bitwise_or.reduce(self.packed, axis=0)
        return np.unpackbits(union, axis=1, count=self.width).astype(bool)

    @staticmethod
    def concatenate(parts: Sequence[Candidates]) -> Candidates:
        """Join the candidates of several passes, at least one."""
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return replace(parts[0], **joined)


@dataclass(frozen=True, eq=False)
class ChosenMasks:
    """The K >= 0 masks that go into the region map; they may overlap.

    ``contained`` marks those that the containment filter would drop; none where it has dropped them.
    """

    masks: np.ndarray  # (K, h, w) bool
    areas: np.ndarray  # (K,) int64 pixels
    ious: np.ndarray  # (K,) float64
    levels: np.ndarray  # (K,) int64
    points: np.ndarray  # (K,) int64
    contained: np.ndarray  # (K,) bool

    def __len__(self) -> int:
        return len(self.areas)

    def take(self, index: np.ndarray) -> ChosenMasks:
        """The masks at ``index``, in that order."""
        return ChosenMasks(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def list_masks(
    logits: Tensor, ious: Tensor, points: Tensor, options: SamSuperpixelOptions, level_bonus: Tensor | None = None
) -> DecodedMasks:
    """Lay out the outputs of n prompts as 3 n masks, and test the predicted IoU.

    Args:
        logits: (n, 3, h, w) float32.
        ious: (n, 3) float32.
        points: (n,) int64.
        options: ``pred_iou`` and ``level_bonus`` are read.
        level_bonus: (3,) that of the options, where it is on the device already.
    """
    bonus = to_device(torch.tensor(options.level_bonus), ious.device) if level_bonus is None else level_bonus
    passes = ious + bonus > options.pred_iou  # (n, 3)
    levels = torch.arange(LEVELS, device=ious.device).expand_as(ious)  # (n, 3)
    numbers = points[:, None].expand_as(ious)  # (n, 3)
    return DecodedMasks(*(values.flatten(0, 1) for values in (logits, passes, ious, levels, numbers)))


def score_masks(masks: DecodedMasks, options: SamSuperpixelOptions) -> ScoredMasks:
    """Test masks for stability and size, without waiting for the device; those with NaN or infinity fail."""
    logits = masks.logits
    _, height, width = logits.shape
    inside = logits > 0  # (m, h, w)
    areas = inside.sum((1, 2))  # (m,)
    passes = (
        masks.passes_iou
        & (calculate_stability_score(logits, 0.0, options.stability_offset) >= options.stability)
        & (areas >= max(1.0, options.min_area * (height * width)))
        & logits.sum((1, 2)).isfinite()
    )
    return ScoredMasks(passes, pack(inside), areas, batched_mask_to_box(inside).long(), *masks[2:])


def collect_all(images: Sequence[Sequence[ScoredMasks]], widths: Sequence[int]) -> list[Candidates]:
    """Copy the masks of several images that passed to the host; it waits for the device once, however many there are.

    The verdicts come together with all masks, so that nobody waits for them first.

    Args:
        images: of each image at least one part.
        widths: w of each image's masks in pixels.
    """
    joined = [[torch.cat(values) for values in zip(*parts, strict=True)] for parts in images]
    arrays = iter(_to_host([values for columns in joined for values in columns]))
    found = []
    for columns, width in zip(joined, widths, strict=True):
        passes, *rest = (next(arrays) for _ in columns)
        kept = np.flatnonzero(passes)
        packed, areas, boxes, ious, levels, points = (values[kept] for values in rest)
        found.append(Candidates(packed, areas, boxes, ious.astype(np.float64), levels, points, width))
    return found


def _to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copy tensors of one device to the host, in one piece."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    pieces = [tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors]
    whole = torch.cat(pieces).cpu().split([len(piece) for piece in pieces])
    # a copy of each piece, since a view of another type must begin at a multiple of its item size
    pairs = zip(whole, tensors, strict=True)
    return [bytes_.clone().view(tensor.dtype).view(tensor.shape).numpy() for bytes_, tensor in pairs]


def pack(masks: Tensor) -> Tensor:
    """Pack masks (m, h, w) bool into (m, h, ceil(w / 8)) uint8, as numpy.packbits packs rows.

    segment_anything's run-length encoding takes 145 ms for 48 masks of 172 x 256 where this takes 0.13 ms on a CPU, and
    unions of packed masks need no decoding.
    """
    if masks.device.type == "cpu":
        return torch.from_numpy(np.packbits(masks.numpy(), axis=2))
    return pack_on_device(masks)


def pack_on_device(masks: Tensor) -> Tensor:
    """:func:`pack` in torch's own operations, for any device."""
    values = 2 ** torch.arange(_BITS - 1, -1, -1, dtype=torch.uint8, device=masks.device)  # numpy.packbits' order
    padded = F.pad(masks.byte(), (0, -masks.shape[2] % _BITS))  # (m, h, w8 * 8)
    return (padded.unflatten(2, (-1, _BITS)) * values).sum(3, dtype=torch.uint8)  # (m, h, w8)


def choose_masks(candidates: Candidates, options: SamSuperpixelOptions, image_scale: float = 1.0) -> ChosenMasks:
    """Choose the masks that go into the region map, whole before part before subpart, within a level the best first.

    Args:
        candidates: M masks; their order does not matter.
        options: see :class:`.options.SamSuperpixelOptions`.
        image_scale: pixels of the image per pixel of the masks, for ``clean_area``.
    """
    survivors = candidates.take(box_nms(candidates.boxes, _ranking(candidates, options), options.box_nms))
    masks, areas = survivors.masks(), survivors.areas
    order = np.arange(len(masks))
    if options.clean_area:
        masks, changed = remove_islands_and_holes(masks, options.clean_area / image_scale)
        areas = masks.sum((1, 2), dtype=np.int64)
        boxes = batched_mask_to_box(torch.from_numpy(masks)).numpy()
        # segment_anything scores 1 for unchanged and 0 for changed masks, equal scores in the order they came in
        order = box_nms(boxes, np.argsort(changed, kind="stable"), options.box_nms)
    levels = survivors.levels
    contained = _rock_sand_water(masks[order], areas[order], levels[order], options)
    if options.granularity is None:
        order, contained = order[~contained], contained[~contained]
    by_level = np.argsort(-levels[order], kind="stable")
    order, contained = order[by_level], contained[by_level]
    return ChosenMasks(
        masks[order], areas[order], survivors.ious[order], levels[order], survivors.points[order], contained
    )


def box_nms(boxes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Greedy non-maximum suppression on boxes.

    torchvision.ops.nms is faster (0.2 ms against 1.1 ms for 1,536 boxes), but it divides where this multiplies, which
    decides one in six unions differently where an IoU is 0.7 exactly. There are 11 such pairs in 27 images, so maps in
    existing stores would change.

    Args:
        boxes: (M, 4) x0, y0, x1, y1; a box spans the coordinates of its first and last pixel, so one that is a pixel
            wide has no area, and neither suppresses nor is suppressed.
        order: (M,) positions, best first.
        threshold: a box is dropped if its IoU with a better one that is kept is larger than this.

    Returns:
        Positions of the boxes that are kept, best first.
    """
    x0, y0, x1, y1 = boxes[order].T
    sizes = (x1 - x0) * (y1 - y0)
    alive = np.ones(len(order), bool)
    for i in range(len(order)):
        if alive[i]:
            across = np.minimum(x1[i + 1 :], x1[i]) - np.maximum(x0[i + 1 :], x0[i])
            down = np.minimum(y1[i + 1 :], y1[i]) - np.maximum(y0[i + 1 :], y0[i])
            common = across.clip(0) * down.clip(0)
            alive[i + 1 :] &= common <= threshold * (sizes[i + 1 :] + sizes[i] - common)
    return order[alive]


def remove_islands_and_holes(masks: np.ndarray, min_area: float) -> tuple[np.ndarray, np.ndarray]:
    """Fill small holes and then drop small islands, as segment_anything does; the largest island always stays.

    Args:
        masks: (K, h, w) bool, none of them empty.
        min_area: holes and islands with fewer pixels than this are removed.

    Returns:
        The masks (K, h, w), and which of them changed (K,) bool.
    """
    cleaned = []
    for mask in masks:
        filled, _ = remove_small_regions(mask, min_area, "holes")
        cleaned.append(remove_small_regions(filled, min_area, "islands")[0])
    result = np.stack(cleaned) if cleaned else masks
    return result, (result != masks).any((1, 2))


def _ranking(candidates: Candidates, options: SamSuperpixelOptions) -> np.ndarray:
    """Best first, a total order: score descending, area ascending, point ascending, level descending."""
    scores = candidates.ious + np.asarray(options.level_priority)[candidates.levels]
    return np.lexsort((-candidates.levels, candidates.points, candidates.areas, -scores))


def _rock_sand_water(
    masks: np.ndarray, areas: np.ndarray, levels: np.ndarray, options: SamSuperpixelOptions
) -> np.ndarray:
    """Mark masks that lie in a kept, coarser mask; rocks (whole) come first, then sand (part), then water (subpart).

    A mask is compared with single kept masks, not with their union, and never with those of its own level; so the
    order within a level does not matter. Gives (K,) bool.
    """
    pixels = masks.shape[1] * masks.shape[2]
    out = np.zeros(len(masks), bool)
    if options.containment is None:
        return out
    # float32 for a fast product; its sums of 0 and 1 are exact below 2^24 pixels
    flat = masks.reshape(len(masks), pixels).astype(np.float32)  # (K, h * w)
    container = np.ones(len(masks), bool)
    if options.max_container_area is not None:
        container = areas <= options.max_container_area * pixels
    for level in reversed(range(LEVELS)):
        these, holders = np.flatnonzero(levels == level), np.flatnonzero((levels > level) & container & ~out)
        if len(holders) and len(these):
            inside = flat[these] @ flat[holders].T / areas[these, None]  # (these, holders)
            out[these] = inside.max(1) >= options.containment
    return out
