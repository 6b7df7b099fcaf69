"""The data set of referring expressions: one item = one picture with some of its expressions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from lavis_svp.datasets.augment import can_mirror, mirror_text
from lavis_svp.datasets.drawing import DrawingOptions, choose_for_evaluation, draw_for_training, in_chunks
from lavis_svp.datasets.layout import Origin
from lavis_svp.datasets.pictures import LoadedPicture, make_upright, read_picture
from lavis_svp.datasets.refcoco import Expression, Picture, RefCOCO
from lavis_svp.superpixels.region_map import RegionMap

OPTIONAL_KEYS = ("image", "region_map", "frozen")
"""Sample keys that a batch has only if every sample of it has them."""

MIRRORED_SUFFIX = "-mirrored"
"""Ends the image key of a mirrored picture, which has other superpixels and features than its original."""


class SuperpixelCache(Protocol):
    """What gives a picture's superpixels."""

    def get(self, image_key: str, picture: np.ndarray) -> RegionMap:
        """The region map of a (H, W, 3) uint8 picture, computed or from a cache."""


class FrozenCache(Protocol):
    """What gives the outputs of the frozen encoders for a picture."""

    def get(self, image_key: str) -> Mapping[str, torch.Tensor] | None:
        """``{"patches": (N, C), "sam": (256, h, w)}`` or None where nothing is stored."""


class ReferringDataset(Dataset[dict[str, Any]]):
    """Pictures with referring expressions and their masks, with the interface of LAVIS's ``BaseDataset``.

    In training an item is a picture with a few of its sentences, drawn anew for each epoch from
    (seed, epoch, index) alone, so that worker processes and resumed runs draw the same. In evaluation every sentence
    (of the protocol) is in exactly one item. :meth:`__getitem__` documents a sample.

    RefCOCO's masks are in the frame in which the picture is stored. A picture with an EXIF orientation is turned
    upright and its masks are turned with it; if instead the annotated size is that of the upright picture, the masks
    are taken as upright already.

    Args:
        vis_processor: (H, W, 3) uint8 -> (4, S, S) tensor; called with ``rng=`` if it has ``takes_rng = True``.
            Its ``hflip_prob``, if it has one, says how often a training picture is mirrored, with its masks and with
            left and right swapped in its sentences; pictures with a sentence that cannot be mirrored stay as they are.
            None needs ``options.load_image = False``.
        text_processor: cleans an expression; None leaves it as it is.
        vis_root: the folder that holds the pictures.
        ann_paths: ``[instances.json, refs(...).p]``.
        splits: exact split names; several are put one after another.
        train: draw sentences (True) or go through all of them (False).
        options: see :class:`~lavis_svp.datasets.drawing.DrawingOptions`.
        superpixel_cache: gives ``region_map``; may be set later.
        frozen_cache: gives ``frozen``; may be set later.
        source: the annotations, if they are in memory already; then ``ann_paths`` is not read.

    Raises:
        FileNotFoundError, ValueError, UnknownNameError: see :class:`~lavis_svp.datasets.refcoco.RefCOCO`.
    """

    origin: Origin | None = None
    """Which published data set this is and where its annotations lie; the builder says it, None = not known."""

    def __init__(
        self,
        vis_processor: Callable[..., torch.Tensor] | None = None,
        text_processor: Callable[[str], str] | None = None,
        vis_root: str | Path = "",
        ann_paths: Sequence[str | Path] = (),
        *,
        splits: Sequence[str] = ("train",),
        train: bool = False,
        options: DrawingOptions | None = None,
        superpixel_cache: SuperpixelCache | None = None,
        frozen_cache: FrozenCache | None = None,
        source: RefCOCO | None = None,
    ) -> None:
        if source is None:
            if len(ann_paths) != 2:
                raise ValueError(f"ann_paths must be [instances.json, the references' file], got {list(ann_paths)}.")
            source = RefCOCO(ann_paths[0], ann_paths[1])
        self.source = source
        self.options = options or DrawingOptions()
        self.train = train
        self.vis_root = str(vis_root)
        self.superpixel_cache = superpixel_cache
        self.frozen_cache = frozen_cache
        self.epoch = 0
        self.set_processors(vis_processor, text_processor)
        self.annotation: list[Picture] = [picture for split in splits for picture in source.pictures(split)]
        self._items = self._list_items()

    def __len__(self) -> int:
        return len(self._items)

    def set_processors(
        self, vis_processor: Callable[..., torch.Tensor] | None, text_processor: Callable[[str], str] | None
    ) -> None:
        """Replace both processors."""
        self.vis_processor, self.text_processor = vis_processor, text_processor

    def set_epoch(self, epoch: int) -> None:
        """Choose which draw of sentences training gets; call it before each epoch, before workers start."""
        self.epoch = epoch

    def leave_out(self, pictures: Collection[Picture]) -> None:
        """Drop some of the pictures in ``annotation``, with all their expressions.

        Args:
            pictures: told by their ids in this data set; those that are not in it are ignored.
        """
        dropped = {(picture.image_id, picture.split) for picture in pictures}
        self.annotation = [one for one in self.annotation if (one.image_id, one.split) not in dropped]
        self._items = self._list_items()

    def expression_ids(self) -> list[str]:
        """Ids of all expressions that the items hold, in order; in training, of all that can be drawn."""
        return [
            self.annotation[picture].expressions[index].expression_id
            for picture, chosen in self._items
            for index in (range(len(self.annotation[picture].expressions)) if self.train else chosen)
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture with some of its expressions.

        Returns:
            "image": (4, S, S) float RGB in [0, 1] and validity; "image_id"; "image_key": sha256 of the file;
            "file_name"; "split"; "original_size": (H, W), upright; for each expression: "text_input",
            "expression_ids", "kinds", "masks" ((H, W) uint8 in {0, 1}), "has_target", "candidates" (a list of indices
            into the instances, or None for all); "instances": {"labels": (H, W) int32, -1 = none, "words"} or None;
            "region_map" and "frozen" where a cache gives them.

        Raises:
            BadPictureError: the picture cannot be decoded.
            ValueError: masks of another size than the picture, an empty expression, features that are missing.
        """
        number, chosen = self._items[index]
        picture = self.annotation[number]
        rng = np.random.default_rng([self.options.seed, self.epoch, index])
        if self.train:
            chosen = draw_for_training(len(picture.expressions), self.options.expressions_per_picture, rng)
        expressions = [picture.expressions[i] for i in chosen]
        texts = [self._clean(picture, expression.text) for expression in expressions]
        mirrored = self.train and self._draw_mirroring(rng) and all(map(can_mirror, texts))
        path = Path(self.vis_root) / picture.file_name
        loaded = read_picture(path)
        place = _Placement(picture, loaded, mirrored, path)
        pixels = place.mirror(loaded.pixels)
        key = loaded.key + (MIRRORED_SUFFIX if mirrored else "")
        sample: dict[str, Any] = {
            "image_id": picture.image_id,
            "image_key": key,
            "file_name": picture.file_name,
            "split": picture.split,
            "original_size": pixels.shape[:2],
            "text_input": [mirror_text(text) for text in texts] if mirrored else texts,
            "expression_ids": [expression.expression_id for expression in expressions],
            "kinds": [expression.kind for expression in expressions],
            "masks": self._masks(place, expressions),
            "has_target": [bool(expression.targets) for expression in expressions],
            "instances": self._instances(place) if self.options.instances else None,
            "candidates": self._candidates(picture, chosen),
        }
        return sample | self._inputs(key, pixels, path, rng)

    def collater(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples: "image" is stacked, (B, 4, S, S); every other key becomes a list of length B.

        "image", "region_map" and "frozen" are there only if every sample has them.
        """
        keys = [key for key in samples[0] if key not in OPTIONAL_KEYS or all(key in sample for sample in samples)]
        batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in keys}
        if "image" in batch:
            batch["image"] = torch.stack(batch["image"])  # (B, 4, S, S)
        return batch

    def displ_item(self, index: int) -> dict[str, Any]:
        """What LAVIS's dataset browser shows of an item."""
        number, chosen = self._items[index]
        picture = self.annotation[number]
        shown = picture.expressions if self.train else [picture.expressions[i] for i in chosen]
        return {"file": picture.file_name, "expressions": [expression.text for expression in shown]}

    def _list_items(self) -> list[tuple[int, list[int]]]:
        """(index into ``annotation``, the expressions of the item); none listed where they are drawn later."""
        if self.train:
            return [(number, []) for number in range(len(self.annotation))]
        items = []
        for number, picture in enumerate(self.annotation):
            rng = np.random.default_rng([self.options.seed, picture.image_id])
            chosen = choose_for_evaluation(len(picture.expressions), self.options.protocol, rng)
            items += [(number, chunk) for chunk in in_chunks(chosen, self.options.max_expressions)]
        return items

    def _clean(self, picture: Picture, text: str) -> str:
        if self.text_processor is None:
            return text
        try:
            return self.text_processor(text)
        except ValueError as error:
            raise ValueError(f"An expression of {picture.file_name}: {error}") from error

    def _draw_mirroring(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < getattr(self.vis_processor, "hflip_prob", 0.0))

    def _inputs(self, key: str, pixels: np.ndarray, path: Path, rng: np.random.Generator) -> dict[str, Any]:
        """The optional keys: the picture for the encoders, its superpixels, what is stored of it."""
        inputs: dict[str, Any] = {}
        if self.options.load_image:
            if self.vis_processor is None:
                raise ValueError("No vis_processor to make 'image' with. Give one, e.g. svp_image_eval.")
            draws = getattr(self.vis_processor, "takes_rng", False)
            inputs["image"] = self.vis_processor(pixels, rng=rng) if draws else self.vis_processor(pixels)
        if self.superpixel_cache is not None:
            inputs["region_map"] = self.superpixel_cache.get(key, pixels)
        frozen = None if self.frozen_cache is None else self.frozen_cache.get(key)
        if frozen is not None:
            inputs["frozen"] = frozen
        elif not self.options.load_image:
            raise ValueError(
                f"load_image is False, but no frozen features are stored for {path} (key {key}). "
                "Compute the features of this split first, or set load_image: true."
            )
        return inputs

    def _masks(self, place: _Placement, expressions: Sequence[Expression]) -> list[np.ndarray]:
        """The target of each expression; those with the same target share an array."""
        masks: dict[tuple[int, ...], np.ndarray] = {}
        for expression in expressions:
            if expression.targets not in masks:
                masks[expression.targets] = place(self.source.target_mask(place.annotated, expression))
        return [masks[expression.targets] for expression in expressions]

    def _instances(self, place: _Placement) -> dict[str, Any]:
        """All objects in one label map; where two overlap, the smaller one is on top."""
        objects = self.source.instances(place.annotated.image_id)
        masks = [place(self.source.mask(place.annotated, instance)).astype(bool) for instance in objects]
        labels = np.full(place.size, -1, np.int32)
        for number in sorted(range(len(objects)), key=lambda number: -int(masks[number].sum())):
            labels[masks[number]] = number
        return {"labels": labels, "words": [instance.words for instance in objects]}

    def _candidates(self, picture: Picture, chosen: Sequence[int]) -> list[list[int]] | None:
        given = [picture.expressions[i].candidates for i in chosen]
        if all(candidates is None for candidates in given):
            return None
        index = {one.annotation_id: number for number, one in enumerate(self.source.instances(picture.image_id))}
        unknown = {one for candidates in given for one in candidates or () if one not in index}
        if unknown:
            raise ValueError(f"{picture.file_name} has no annotations {sorted(unknown)}, named as candidates.")
        return [[index[one] for one in candidates or ()] for candidates in given]


class _Placement:
    """Brings masks from the annotated frame into that of the sample's picture: upright, then perhaps mirrored."""

    def __init__(self, picture: Picture, loaded: LoadedPicture, mirrored: bool, path: Path) -> None:
        self.size = loaded.pixels.shape[:2]
        self.mirrored = mirrored
        if picture.size not in (loaded.stored_size, self.size):
            raise ValueError(
                f"{path} is {self.size[0]}x{self.size[1]} (height x width), but its masks are "
                f"{picture.size[0]}x{picture.size[1]}. Use the pictures that were annotated, in their original size."
            )
        self.orientation = loaded.orientation if picture.size == loaded.stored_size else 1
        self.annotated = picture

    def mirror(self, pixels: np.ndarray) -> np.ndarray:
        """The upright array, mirrored if the sample is."""
        return np.ascontiguousarray(pixels[:, ::-1]) if self.mirrored else pixels

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        """An annotated (H, W) mask in the frame of the sample's picture."""
        return self.mirror(np.ascontiguousarray(make_upright(mask, self.orientation)))
