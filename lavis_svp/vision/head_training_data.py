"""Records to train a boundary head on, of images: nested labels, and SAM's embeddings at the sides that it shall serve.

The labels are SAM's automatic masks of the images, merged to five nested maps, so nobody has to annotate anything; or
whatever ``labels_of`` gives, such as SA-1B's masks (:mod:`lavis_svp.datasets.sa1b`).
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lavis_svp.common.devices import checked_device, cpus_per_process, resolve_dtype
from lavis_svp.common.files import BadFileError, BrokenFileError, read_checked_json, write_checked_json
from lavis_svp.common.images import MAX_IMAGE_PIXELS, read_pixels
from lavis_svp.common.pipeline import READ_AHEAD, READERS, ahead, read_compute_write
from lavis_svp.superpixels.generator import SamEmbedding
from lavis_svp.superpixels.one_pass.head import LEVELS, STRIDE
from lavis_svp.superpixels.one_pass.labels import MAX_LABELS, HeadRecord, read_record
from lavis_svp.superpixels.sam.generator import SamSuperpixels
from lavis_svp.superpixels.store import check_settings, start_worker
from lavis_svp.vision.sam import SamEncoder, build_sam
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels, embed_image, sam_input_image

LabelsOf = Callable[[Path, np.ndarray], np.ndarray]
"""Nested labels (L, H, W), coarse to fine, of an image file and its pixels (H, W, 3); at the top level of a module."""

TEACHER = {"preset": "exact", "decisions": "low"}
"""Options of SAM's automatic masks as the teacher: the whole grid of points, at the decoder's resolution."""

SETTINGS = "settings.json"
_PENDING_PER_WORKER = 2
_GRANULARITIES = np.linspace(0, 1, LEVELS).tolist()


class _Parts(NamedTuple):
    encoders: dict[int, SamEncoder]  # by side; the teacher's is there, too
    teacher: SamSuperpixels


@dataclass(frozen=True)
class HeadDataMaker:
    """Makes :class:`HeadRecord` of images. It is pickled by its arguments; a worker loads SAM once, when it needs it.

    A SAM is held for each side, and one for the teacher's if that is not among them.

    Args:
        sam: zoo name or path of the checkpoint of whose embeddings the head shall read superpixels.
        sides: SAM's input sides in pixels.
        teacher_side: that of the automatic masks; they are best at 1024.
        teacher_options: of ``SamSuperpixelOptions``, over :data:`TEACHER`.
        device: where SAM runs, see ``common.devices.checked_device``.
        labels_of: gives the labels instead of the automatic masks.
        labels_name: what ``labels_of`` is called in the settings of the records.

    Raises:
        ValueError: an unknown option or device, or a side that does not fit.
        FileNotFoundError: no such checkpoint.
    """

    sam: str
    sides: tuple[int, ...]
    teacher_side: int = 1024
    teacher_options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    labels_of: LabelsOf | None = None
    labels_name: str = "masks"

    def __post_init__(self) -> None:
        checked_device(self.device)
        for side in {*self.sides, self.teacher_side}:
            SamImageSuperpixels(self.sam, side, **{**TEACHER, **self.teacher_options})  # raises what is wrong

    def settings(self) -> dict[str, Any]:
        """What the records depend on, as JSON values."""
        teacher = SamImageSuperpixels(self.sam, self.teacher_side, **{**TEACHER, **self.teacher_options}).settings()
        kind, _, rest = teacher["encoder"].partition("@")
        weights = rest.partition(":")[2]
        labels = teacher if self.labels_of is None else {}
        return {"encoder": f"{kind}:{weights}", "sides": sorted(self.sides), "kind": self.labels_name, "labels": labels}

    @property
    def encoder_kind(self) -> str:
        """The kind of SAM's image encoder: "tiny_vit", "vit_b", "vit_l", "vit_h", or "vit" of another shape."""
        return str(self.settings()["encoder"].partition(":")[0])

    def read(self, file: Path, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[np.ndarray, np.ndarray | None]:
        """The (H, W, 3) uint8 pixels of an image file, and its labels unless they are automatic masks.

        Raises:
            BrokenFileError: it, or what is annotated of it, cannot be read.
        """
        pixels = read_pixels(file, max_pixels)
        return pixels, None if self.labels_of is None else self.labels_of(file, pixels)

    @torch.inference_mode()
    def make(self, pixels: np.ndarray, labels: np.ndarray | None = None) -> HeadRecord:
        """Make the record of one image.

        Args:
            pixels: (H, W, 3) uint8.
            labels: (L, H', W') nested; None: of automatic masks.

        Raises:
            ValueError: SAM's embedding is not finite, or a map has too many regions.
        """
        parts = _load(self.sam, self.sides, self.teacher_side, json.dumps(dict(self.teacher_options)), self.device)
        sides = {*self.sides, self.teacher_side} if labels is None else set(self.sides)
        found = {side: _embed(parts.encoders[side], pixels) for side in sorted(sides)}
        embeddings, images = {}, {}
        for side in self.sides:
            one = found[side]
            height, width = (-(-length // STRIDE) for length in one.input_size)
            assert one.image is not None
            embeddings[side] = one.embedding.half()  # (256, S / 16, S / 16)
            images[side] = (one.image[:, :height, :width] * 255).round().to(torch.uint8)  # (3, h, w)
            if not torch.isfinite(embeddings[side]).all():
                raise ValueError(
                    f"SAM's embedding at side {side} holds NaN or infinite values. Is its checkpoint sound?"
                )
        if labels is None:
            maps = parts.teacher.at_granularities(found[self.teacher_side], _GRANULARITIES)
            labels = np.stack([one.labels for one in maps])  # (L, h, w)
        if labels.max() > MAX_LABELS:
            raise ValueError(f"A label map has {labels.max() + 1} regions; the limit is {MAX_LABELS + 1}.")
        return HeadRecord(torch.from_numpy(labels.astype(np.int16)), embeddings, images)


def prepare_records(
    maker: HeadDataMaker,
    images: Mapping[str, Path],
    folder: Path,
    workers: int = 2,
    max_pixels: int = MAX_IMAGE_PIXELS,
    progress: bool = True,
) -> tuple[list[Path], dict[str, str]]:
    """Make the records that a folder lacks, from where an earlier run stopped; damaged ones are made again.

    Args:
        maker: of the records.
        images: image files by their keys.
        folder: of the records, ``<key>.safetensors``, and of the settings with which they are made.
        workers: processes on a CPU; on a GPU one works, in which threads read ahead and write behind.
        max_pixels: of the largest image that is read.
        progress: show progress bars.

    Returns:
        The records' files in the order of the images, and by key the faults of images that cannot be read.

    Raises:
        BadFileError: the folder holds records of other settings.
        ValueError: see :meth:`HeadDataMaker.make`.
    """
    settings, header = maker.settings(), folder / SETTINGS
    if header.exists():
        check_settings(read_checked_json(header, "Delete its folder."), settings, folder, "records")
    else:
        write_checked_json(header, settings)
    files = {key: folder / f"{key}.safetensors" for key in images}
    with ThreadPoolExecutor(READERS) as pool:
        found = ahead(pool, functools.partial(_is_sound, sides=maker.sides), files.values(), READ_AHEAD)
        shown = list(tqdm(found, "checking records", len(files), unit="image", disable=not progress, leave=False))
    lacking = {key: images[key] for key, sound in zip(images, shown, strict=True) if not sound}
    job = functools.partial(_make_one, maker, folder, max_pixels)
    if prepares_in_threads(maker.device):
        done = _on_accelerator(maker, folder, max_pixels, lacking)
    elif workers <= 1 or len(lacking) <= 1:
        done = map(job, lacking.items())
    else:
        done = _in_processes(job, lacking, workers)
    bar = tqdm(done, "labels and embeddings", len(lacking), unit="image", disable=not progress)
    faults = {key: fault for key, fault in bar if fault}
    return [file for key, file in files.items() if key not in faults], faults


def prepares_in_threads(device: str) -> bool:
    """Whether one process with threads keeps a device busy, as it does a GPU, and several processes do not."""
    return checked_device(device).type != "cpu"


def _is_sound(file: Path, sides: Sequence[int]) -> bool:
    try:
        read_record(file, sides)
    except FileNotFoundError:
        return False
    except BadFileError as error:
        logging.warning("%s It is made again now.", error)
        return False
    return True


_Done = tuple[str, str]  # an image's key, and its fault or nothing


class _InWork(NamedTuple):
    """An image on its way to a record."""

    key: str
    file: Path
    source: tuple[np.ndarray, np.ndarray | None] | None = None  # what was read of it
    record: HeadRecord | None = None
    fault: str = ""


def _make_one(maker: HeadDataMaker, folder: Path, max_pixels: int, entry: tuple[str, Path]) -> _Done:
    """Make and keep the record of one image, possibly in a worker."""
    return _write(folder, _compute(maker, _read(maker, max_pixels, entry)))


def _read(maker: HeadDataMaker, max_pixels: int, entry: tuple[str, Path]) -> _InWork:
    key, file = entry
    try:
        return _InWork(key, file, maker.read(file, max_pixels))
    except BrokenFileError as error:
        return _InWork(key, file, fault=f"{type(error).__name__}: {error}")


def _compute(maker: HeadDataMaker, one: _InWork) -> _InWork:
    if one.source is None:
        return one
    try:
        return one._replace(source=None, record=maker.make(*one.source))
    except Exception as error:
        error.add_note(f"(while making the record of {one.file})")
        raise


def _write(folder: Path, one: _InWork) -> _Done:
    if one.record is not None:
        one.record.save(folder / f"{one.key}.safetensors")
    return one.key, one.fault


def _in_processes(
    job: Callable[[tuple[str, Path]], _Done], lacking: Mapping[str, Path], workers: int
) -> Iterator[_Done]:
    # spawn: forking a process in which torch or BLAS threads run can deadlock
    threads = max(1, cpus_per_process() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(), threads)) as pool:
        try:
            yield from ahead(pool, job, lacking.items(), workers * _PENDING_PER_WORKER)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _on_accelerator(
    maker: HeadDataMaker, folder: Path, max_pixels: int, lacking: Mapping[str, Path]
) -> Iterator[_Done]:
    read, write = functools.partial(_read, maker, max_pixels), functools.partial(_write, folder)
    return read_compute_write(
        lacking.items(), read, lambda batch: [_compute(maker, one) for one in batch], write, batch_size=1
    )


def _embed(encoder: SamEncoder, pixels: np.ndarray) -> SamEmbedding:
    return embed_image(encoder, sam_input_image(pixels, encoder.side), with_image=True)


@functools.lru_cache(maxsize=1)
def _load(sam: str, sides: tuple[int, ...], teacher_side: int, teacher_options: str, device: str) -> _Parts:
    """Load SAM at all sides; what was loaded last in this process is kept."""
    place = checked_device(device)
    loaded = {side: build_sam(sam, side, dtype=resolve_dtype("auto", place)) for side in {*sides, teacher_side}}
    teacher = loaded[teacher_side]
    for part in (teacher.prompt_encoder, teacher.mask_decoder, *(one.encoder for one in loaded.values())):
        part.to(place)
    options = {**TEACHER, **json.loads(teacher_options)}
    generator = SamSuperpixels(teacher.prompt_encoder, teacher.mask_decoder, teacher.name, **options)
    return _Parts({side: one.encoder for side, one in loaded.items()}, generator)
