"""What the losses compare with: made on the CPU, in a loader's worker, from masks and superpixels, without weights.

In both classes, tensors are what the device reads and lists what the host reads, so that
:class:`~lavis_svp.common.transfer.Packed` moves all tensors of a batch in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.common.images import nearest
from lavis_svp.language.nouns import COLOUR_NOUNS, NounFinder
from lavis_svp.superpixels.region_map import RegionMap, region_ious
from lavis_svp.vision.geometry import SamInputGeometry, covered_cells, mask_centre, mask_to_covered_cells
from lavis_svp.vision.types import Grid

Resolution = Literal["original", "low"]
PLACE_WORDS = ("left", "right", "above", "below", "top", "bottom")
COMPOSED = "composed"  # in an image's annotated objects: whether a classifier of photographs does not know them
NO_WORD = -1  # pads the token ids of short words; a language model embeds it as id 0, and it does not count


# ---------------------------------------------------------------- masks


@dataclass
class MaskTargets:
    """K target masks at the resolution at which the mask losses are taken.

    Args:
        sizes: of each mask, in pixels of the image, or at the low resolution in cells that the image covers; empty
            without any mask.
        low: at the low resolution (K, h', w') float32, the largest of the ``sizes``: the share of what the image shows
            in a cell that lies in the mask; 0 beyond the mask's own size.
        cells: at the low resolution (K, 2) int64, the ``sizes`` for the device.
        original: else one (n, H, W) uint8 0/1 for each run of n masks in a row whose images have one geometry.
        geometry: how the images of each of these runs lie in SAM's input.
    """

    sizes: list[tuple[int, int]]
    low: Tensor | None = None
    cells: Tensor | None = None
    original: list[Tensor] = field(default_factory=list)
    geometry: list[SamInputGeometry] = field(default_factory=list)


def mask_targets(
    masks: Sequence[np.ndarray], geometry: Sequence[SamInputGeometry], resolution: Resolution, size: tuple[int, int]
) -> MaskTargets:
    """Bring K target masks to the resolution at which the mask losses are taken.

    Args:
        masks: K masks (H, W) 0/1 at the images' own sizes.
        geometry: K places of the masks' images in SAM's input.
        resolution: see :class:`~lavis_svp.segmentation.losses.LossOptions`.
        size: (4h, 4w), the decoder's grid over SAM's input.

    Raises:
        ValueError: a mask has another size than its image, or there are more or fewer masks than places.
    """
    for mask, place in zip(masks, geometry, strict=True):
        if tuple(mask.shape) != place.original_size:
            raise ValueError(f"The mask is {tuple(mask.shape)}, but its image is {place.original_size}.")
    if not masks:
        return MaskTargets([])
    places: list[SamInputGeometry] = []
    stacks: list[Tensor] = []
    for place, run in groupby(range(len(masks)), key=lambda index: geometry[index]):
        places.append(place)
        stacks.append(torch.from_numpy(np.stack([np.asarray(masks[index], np.uint8) for index in run])))  # (n, H, W)
    if resolution == "original":
        return MaskTargets([(m.shape[0], m.shape[1]) for m in masks], original=stacks, geometry=places)
    sizes = [covered_cells(place, size) for place in geometry]
    low = torch.zeros(len(masks), max(rows for rows, _ in sizes), max(columns for _, columns in sizes))
    start = 0
    for place, stack in zip(places, stacks, strict=True):
        shares = mask_to_covered_cells(stack, place, size)  # (n, rows, columns)
        low[start : start + len(stack), : shares.shape[1], : shares.shape[2]] = shares
        start += len(stack)
    return MaskTargets(sizes, low=low, cells=torch.tensor(sizes))


# ---------------------------------------------------------------- auxiliary losses


@dataclass
class WordTargets:
    """The words that name the annotated objects of B images, and the object of each superpixel or patch.

    The batch's V words are each other's negatives. Its O objects are counted through, image after image.

    Args:
        ids: (V, L) int64, the token ids of each word, see :func:`word_token_ids`.
        named: (O + 1, V) float32, 1 where a word names an object; the last row, which is index -1, names none.
        annotated: (B,) bool, False for an image without annotation.
        owner: (B, S) int64, the object that a superpixel shows, -1 for none; None where tokens are not superpixels.
        shares: else (B, O', N) float32, the share of each patch that an object of the image covers.
        first: with ``shares`` (B,) int64, the number of each image's first object.
        nouns: (O, J) int64, the indices of an object's names in a table of nouns, -1 in padding; None: not asked for.
    """

    ids: Tensor
    named: Tensor
    annotated: Tensor
    owner: Tensor | None = None
    shares: Tensor | None = None
    first: Tensor | None = None
    nouns: Tensor | None = None


@dataclass
class AuxiliaryTargets:
    """What the auxiliary losses compare with; None for a loss that is off, or has nothing to learn in this batch.

    Args:
        iou: (P, S) float32 IoU of the target of each of P expressions with each superpixel of its image, 0 in padding.
        inside: (P, S) float32 the share of each superpixel that lies in the target, 0 in padding.
        areas: (P, S) float32 areas of the superpixels, as shares of the image, 0 in padding.
        shares: where tokens are not superpixels, (P, N) float32 share of each patch that the target covers.
        centres: (P, 2) float32, x and y of the targets' centres, in shares of SAM's side.
        words: for word alignment; None if the batch has fewer than two words.
        place_ids: (6, L) int64 token ids of ``PLACE_WORDS``.
    """

    iou: Tensor | None = None
    inside: Tensor | None = None
    areas: Tensor | None = None
    shares: Tensor | None = None
    centres: Tensor | None = None
    words: WordTargets | None = None
    place_ids: Tensor | None = None


def auxiliary_targets(
    losses: Collection[str],
    *,
    masks: Sequence[np.ndarray],
    image_index: Sequence[int],
    geometry: Sequence[SamInputGeometry],
    grids: Sequence[Grid],
    region_maps: Sequence[RegionMap] | None,
    instances: Sequence[Mapping[str, Any] | None] | None,
    tokenizer: Callable[..., Any],
    finder: NounFinder | None = None,
) -> AuxiliaryTargets:
    """Prepare what the auxiliary losses compare with.

    Args:
        losses: names of the losses that are on, see ``AuxiliaryLossOptions.enabled``.
        masks: P masks (H, W) 0/1, the targets of the expressions that have one.
        image_index: the image of each of these.
        geometry: where each of B images lies in SAM's input.
        grids: the (h, w) patch grid of each.
        region_maps: the superpixels of each; None where the projector makes its tokens from patches alone.
        instances: for each image its annotated objects: ``labels`` (H, W) int32, the object of each pixel or -1, and
            ``words``, the words of each object; None where an image has no annotation.
        tokenizer: of the language model.
        finder: finds the names of objects in a table of nouns; None: nobody asks for them.
    """
    targets = AuxiliaryTargets()
    if masks and "grounding" in losses:
        if region_maps is None:
            targets.shares = _padded([patch_shares(m, grids[i]) for m, i in zip(masks, image_index, strict=True)])
        else:
            ious = [region_iou(region_maps[i], m) for m, i in zip(masks, image_index, strict=True)]
            targets.iou = _padded([torch.from_numpy(iou) for iou in ious])  # (P, S)
    if masks and "regions" in losses and region_maps is not None:
        pairs = [(region_maps[i], m) for m, i in zip(masks, image_index, strict=True)]
        targets.inside = _padded([torch.from_numpy(region_inside(one, m)) for one, m in pairs])  # (P, S)
        sizes = [one.areas / one.labels.size for one, _ in pairs]
        targets.areas = _padded([torch.from_numpy(size.astype(np.float32)) for size in sizes])  # (P, S)
    if masks and "point_regression" in losses:
        centres = [mask_centre(m, geometry[i]) for m, i in zip(masks, image_index, strict=True)]
        targets.centres = torch.stack(centres)  # (P, 2)
    if instances is not None and "word_alignment" in losses:
        targets.words = word_targets(instances, grids, region_maps, tokenizer)
        if targets.words is not None and finder is not None:
            objects = [
                words if item.get(COMPOSED, False) else ()
                for item in instances
                if item is not None
                for words in item["words"]
            ]
            targets.words.nouns = object_nouns(objects, finder)
    if "place_alignment" in losses:
        targets.place_ids = word_token_ids(PLACE_WORDS, tokenizer)
    return targets


def word_targets(
    instances: Sequence[Mapping[str, Any] | None],
    grids: Sequence[Grid],
    region_maps: Sequence[RegionMap] | None,
    tokenizer: Callable[..., Any],
) -> WordTargets | None:
    """Prepare word alignment; the arguments are those of :func:`auxiliary_targets`.

    Returns:
        None if the batch has fewer than two words.

    Raises:
        ValueError: an image shows an object that has no list of words.
    """
    for item in instances:
        if item is not None and int(item["labels"].max(initial=-1)) >= len(item["words"]):
            raise ValueError(
                f"The labels of an image name object {item['labels'].max()}, but there are words for "
                f"{len(item['words'])} objects."
            )
    vocabulary = sorted({w for item in instances if item is not None for words in item["words"] for w in words})
    if len(vocabulary) < 2:
        return None
    column = {word: index for index, word in enumerate(vocabulary)}
    names = [[] if item is None else list(item["words"]) for item in instances]
    first = np.cumsum([0, *map(len, names)])
    named = torch.zeros(int(first[-1]) + 1, len(vocabulary))
    for row, words in enumerate(words for image in names for words in image):
        named[row, [column[word] for word in words]] = 1
    targets = WordTargets(
        ids=word_token_ids(vocabulary, tokenizer),
        named=named,
        annotated=torch.tensor([item is not None for item in instances]),
    )
    if region_maps is None:
        shares = [
            torch.zeros(1, h * w) if item is None else object_shares(item["labels"], (h, w))
            for item, (h, w) in zip(instances, grids, strict=True)
        ]
        targets.shares, targets.first = _padded(shares), torch.from_numpy(first[:-1])
        return targets
    owners = []
    for item, regions, start in zip(instances, region_maps, first[:-1], strict=True):
        owner = np.full(regions.count, -1) if item is None else instance_of_region(regions, item["labels"])
        owners.append(torch.from_numpy(np.where(owner >= 0, owner + start, -1)))  # (S_b,)
    targets.owner = _padded(owners, value=-1)  # (B, S)
    return targets


def object_nouns(objects: Sequence[Sequence[str]], finder: NounFinder) -> Tensor:
    """The indices of objects' names in a table of nouns: (O, J) int64, -1 in padding.

    Args:
        objects: for each of O objects the words that hold of it, its category first. A word that is a colour as well
            is a name only as the category: an orange fish is no fruit.
        finder: knows the table.
    """
    names = [[word for n, word in enumerate(words) if n == 0 or word not in COLOUR_NOUNS] for words in objects]
    rows = [sorted({noun.index for word in words for noun in finder.find(word)}) or [-1] for words in names]
    return _padded([torch.tensor(row) for row in rows] or [torch.full((1,), -1)], value=-1)  # (O, J)


def word_token_ids(words: Sequence[str], tokenizer: Callable[..., Any]) -> Tensor:
    """Token ids of words as they stand inside a sentence, (V, L) int64, short words padded with ``NO_WORD``."""
    rows = tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"]
    return _padded([torch.tensor(row, dtype=torch.long) for row in rows], value=NO_WORD)


def region_iou(region_map: RegionMap, mask: np.ndarray) -> np.ndarray:
    """IoU of S regions with a 0/1 mask (H, W) of their image at any resolution, at the map's own: (S,) float32."""
    small = nearest(mask, region_map.labels.shape)
    return region_ious(region_map.labels, small, region_map.areas).astype(np.float32)


def region_inside(region_map: RegionMap, mask: np.ndarray) -> np.ndarray:
    """The share of each of S regions that lies in a 0/1 mask (H, W) of their image at any resolution: (S,) float32."""
    small = nearest(mask, region_map.labels.shape) > 0
    inside = np.bincount(region_map.labels[small & (region_map.labels >= 0)], minlength=region_map.count)
    return (inside / np.maximum(region_map.areas, 1)).astype(np.float32)


def instance_of_region(region_map: RegionMap, instance_labels: np.ndarray, min_share: float = 0.5) -> np.ndarray:
    """The object that covers more than ``min_share`` of each region, -1 where none does.

    Args:
        region_map: S regions.
        instance_labels: (H, W) int32 object of each pixel, -1 = none, at any resolution of the same image.
        min_share: share of the region's area.

    Returns:
        (S,) int64.
    """
    labels = region_map.labels
    small = nearest(instance_labels, labels.shape)
    count = int(instance_labels.max(initial=-1)) + 1
    if count == 0:
        return np.full(region_map.count, -1)
    both = (labels >= 0) & (small >= 0)
    table = np.bincount(labels[both] * count + small[both], minlength=region_map.count * count)
    share = table.reshape(region_map.count, count) / np.maximum(region_map.areas, 1)[:, None]  # (S, objects)
    return np.where(share.max(1) > min_share, share.argmax(1), -1)


def patch_shares(mask: np.ndarray, grid: Grid) -> Tensor:
    """The share of each patch of a ``grid`` over the whole image that a mask (H, W) 0/1 covers: (N,) float32."""
    return F.adaptive_avg_pool2d(torch.as_tensor(mask)[None].float(), grid).flatten()  # (N,)


def object_shares(labels: np.ndarray, grid: Grid) -> Tensor:
    """The share of each patch that each object covers, of one at least.

    Args:
        labels: (H, W) int32 object of each pixel, -1 = none.
        grid: the patches over the whole image.

    Returns:
        (objects, N) float32.
    """
    objects = np.arange(max(1, int(labels.max(initial=-1)) + 1))
    one_hot = torch.from_numpy(labels[None] == objects[:, None, None])  # (objects, H, W)
    return F.adaptive_avg_pool2d(one_hot.float(), grid).flatten(1)  # (objects, N)


def _padded(rows: Sequence[Tensor], value: float = 0) -> Tensor:
    """Stack tensors of one rank, each padded at the end of every axis to the largest."""
    shape = [max(lengths) for lengths in zip(*(row.shape for row in rows), strict=True)]
    out = rows[0].new_full((len(rows), *shape), value)
    for index, row in enumerate(rows):
        corner: tuple[slice, ...] = tuple(slice(length) for length in row.shape)
        out[index][corner] = row
    return out
