"""Train a boundary head on records of images: the batches, the loss, the steps, and how good it is on held-out images.

A head learns two things of the nested maps of a record: through which cells a boundary of each map runs, and in how
many of the maps two cells lie in one region. Everything random in a step follows from the seed and the step's number,
so a run that was killed and resumed gives the same head as one that was not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from lavis_svp.common.checkpoints import (
    CorruptCheckpointError,
    content_digest,
    read_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from lavis_svp.common.files import BadFileError
from lavis_svp.common.options import check_whole_number
from lavis_svp.common.pipeline import READERS, ahead
from lavis_svp.common.transfer import move_to_device
from lavis_svp.superpixels.evaluation import tolerance_of
from lavis_svp.superpixels.one_pass.head import (
    EMBEDDING_STRIDE,
    LEVELS,
    STRIDE,
    BoundaryHead,
    HeadOutput,
    boundary_strength,
)
from lavis_svp.superpixels.one_pass.labels import HeadRecord, boundary_targets, nearest_labels, read_record

CHECKPOINT = "training.pth"
_DIGESTS = {"records": "other images", "upscaler": "another SAM"}  # settings that a message cannot show
MIN_STEPS = 20
"""Fewer have no place for the warm-up of the one-cycle schedule."""

SAVE_EVERY = 200  # steps between two checkpoints, each with a look at the held-out images
HELD_OUT = 10  # one record in so many is not trained on
VALIDATED = 16  # held-out records that are looked at

_LEARNING_RATE, _WARM_UP, _WEIGHT_DECAY = 2e-3, 0.1, 1e-4
_BOUNDARY_WEIGHTS = (4.0, 3.0, 2.5, 2.0, 2.0)
"""Of a boundary's cells against the others, per level: a coarse map has fewer."""
_AFFINITY_WEIGHT = 0.5
_PAIRS, _NEAR_SHARE, _NEAR = 2048, 0.7, 8  # pairs of cells an image; the share within an eighth of the side
_MIRRORED, _BRIGHTENED, _BRIGHTNESS = 0.5, 0.8, (0.7, 1.3)
_SURE = 1e-4  # probabilities stay so far from 0 and 1
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_SHOWN_EVERY = 10  # steps; reading the loss waits for the device
_BATCHES_AHEAD = 4


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained.

    Args:
        steps: of AdamW, with a one-cycle schedule over all of them.
        batch_size: images of a step at the smallest of the sides; at larger ones fewer, so that the cells stay as many.
        sides: SAM's sides in pixels; a step draws one, a small one more often, since it holds more images.
        seed: of the first weights and of what each step draws.
    """

    steps: int = 3000
    batch_size: int = 6
    sides: tuple[int, ...] = (384, 512, 1024)
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_number("steps", self.steps, MIN_STEPS)
        check_whole_number("batch_size", self.batch_size, 1)
        check_whole_number("seed", self.seed, 0)
        for side in self.sides:
            check_whole_number("A side", side, EMBEDDING_STRIDE)
            if side % EMBEDDING_STRIDE:
                raise ValueError(f"A side must be a multiple of {EMBEDDING_STRIDE}, got {side}.")
        if not self.sides or len(set(self.sides)) < len(self.sides):
            raise ValueError(f"The sides must be different, and at least one, got {list(self.sides)}.")

    def images_at(self, side: int) -> int:
        """Images of a step at a side."""
        return max(1, self.batch_size * min(self.sides) ** 2 // side**2)


class TrainedHead(NamedTuple):
    """What :func:`train_head` gives."""

    head: BoundaryHead
    """On the CPU, its norms not folded yet."""
    history: list[dict[str, float]]
    """What :func:`validate` found, with the number of steps; empty where nothing was held out."""


class HeadBatch(NamedTuple):
    """B images at one side S of SAM, q = S / 4."""

    embedding: Tensor
    """(B, 256, S / 16, S / 16) float16."""
    image: Tensor
    """(B, 3, q, q) float32 in 0..1, zeros in the padding."""
    targets: Tensor
    """(B, L, q, q) float32 in {0, 1}: boundaries."""
    valid: Tensor
    """(B, 1, q, q) float32, 1 where the image is."""
    pairs: Tensor
    """(B, 2, P) int64: cells of the (q / 2, q / 2) grid in raster order."""
    together: Tensor
    """(B, P) float32: the share of the maps in which a pair lies in one region."""
    counted: Tensor
    """(B, P) float32, 0 for pairs with a cell without a region."""


def held_out(records: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split records, by the order of their names (which are digests), into those to train on and one in ten."""
    ordered = sorted(records)
    if len(ordered) < 2:
        return ordered, []
    return [path for number, path in enumerate(ordered) if number % HELD_OUT], ordered[::HELD_OUT]


def train_head(
    records: Sequence[Path],
    folder: Path,
    options: HeadTraining,
    device: torch.device | str = "cpu",
    save_every: int = SAVE_EVERY,
    progress: bool = True,
    upscaler: nn.Module | None = None,
) -> TrainedHead:
    """Train a head, from the checkpoint in a folder on where there is one.

    Args:
        records: files of :class:`.labels.HeadRecord` with the sides of the options; one in ten is held out.
        folder: gets ``training.pth``, written every ``save_every`` steps, whole or not at all.
        options: how.
        device: where.
        save_every: steps between two checkpoints, each with a validation.
        progress: show a progress bar, and a line for each validation.
        upscaler: SAM's ``mask_decoder.output_upscaling``, see :meth:`.head.BoundaryHead.copy_upscaler`; None: one with
            random weights.

    Raises:
        ValueError: no record, a checkpoint of other settings, or a loss that is not finite.
        BadFileError: a damaged record or checkpoint.
    """
    training, apart = held_out(records)
    if not training:
        raise ValueError("There is no record to train a head on.")
    names = hashlib.sha256("\n".join(path.name for path in sorted(records)).encode()).hexdigest()
    settings = {**asdict(options), "sides": list(options.sides), "records": names}
    settings["upscaler"] = None if upscaler is None else content_digest(upscaler.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = BoundaryHead()
    if upscaler is not None:
        head.copy_upscaler(upscaler)
    head.to(device)
    optimizer = torch.optim.AdamW(head.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, _LEARNING_RATE, total_steps=options.steps, pct_start=_WARM_UP)
    remove_unfinished(folder)
    start, history = 0, []
    if (folder / CHECKPOINT).is_file():
        state = _read_state(folder / CHECKPOINT, settings)
        head.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, history = state["iters"], state["history"]

    with tqdm(total=options.steps, initial=start, desc="training the head", unit="step", disable=not progress) as bar:
        for step, batch in _batches(training, options, start):
            head.train()
            batch = move_to_device(batch, device)
            loss = head_loss(head(batch.embedding.float(), batch.image), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            done, last = step + 1, step + 1 == options.steps
            if done % _SHOWN_EVERY == 0 or done % save_every == 0 or last:
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise ValueError(f"The loss is {value} at step {done}: try another seed, or other images.")
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            if done % save_every == 0 or last:
                if apart:
                    history = [*history, {"steps": done, **validate(head, apart, options.sides, device)}]
                    if progress:
                        tqdm.write(", ".join(f"{name} {value:g}" for name, value in history[-1].items()))
                state = {"model": head.state_dict(), "optimizer": optimizer.state_dict(), "iters": done}
                state |= {"schedule": schedule.state_dict(), "config": settings, "history": history}
                save_checkpoint(folder / CHECKPOINT, state)
    return TrainedHead(head.cpu().eval(), history)


def _read_state(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        state = read_checkpoint(path)
    except CorruptCheckpointError as error:
        raise BadFileError(f"{error} Delete it to train the head from the start.") from error
    before = state.get("config", {})
    differ = [key for key, value in settings.items() if before.get(key) != value]
    if differ:
        told = ", ".join(f"{key} {before.get(key)} (now {settings[key]})" for key in differ if key not in _DIGESTS)
        told = told or " and ".join(_DIGESTS[key] for key in differ)
        raise ValueError(f"{path} was begun with {told}. Give another --out, or delete it to train from the start.")
    return state


# ---------------------------------------------------------------------------------------------------- batches


def _batches(records: Sequence[Path], options: HeadTraining, start: int) -> Iterator[tuple[int, HeadBatch]]:
    """The batches from step ``start`` on; threads read ahead."""
    shares = 1.0 / np.array(options.sides)

    def load(step: int) -> tuple[int, HeadBatch]:
        rng = np.random.default_rng([options.seed, step])
        side = int(rng.choice(options.sides, p=shares / shares.sum()))
        count = options.images_at(side)
        chosen = rng.choice(len(records), count, replace=len(records) < count)
        return step, make_batch([read_record(records[index], [side]) for index in chosen], side, rng)

    with ThreadPoolExecutor(READERS) as pool:
        yield from ahead(pool, load, range(start, options.steps), _BATCHES_AHEAD)


def make_batch(records: Iterable[HeadRecord], side: int, rng: np.random.Generator, augment: bool = True) -> HeadBatch:
    """Make a batch of records at one side of SAM.

    Args:
        records: B of them.
        side: S.
        rng: draws pairs of cells, and what is mirrored and made brighter or darker.
        augment: mirror half of the images, embedding and all (SAM's encoder would give nearly the same of the mirrored
            image), and change the brightness of most of those that the head sees.
    """
    return HeadBatch(*map(torch.stack, zip(*(_example(one, side, rng, augment) for one in records), strict=True)))


def _example(record: HeadRecord, side: int, rng: np.random.Generator, augment: bool) -> tuple[Tensor, ...]:
    cells = side // STRIDE
    small = record.images[side]
    height, width = small.shape[1:]
    image, valid = torch.zeros(3, cells, cells), torch.zeros(1, cells, cells)
    image[:, :height, :width] = small.float() / 255.0
    valid[:, :height, :width] = 1.0
    targets = torch.zeros(record.labels.shape[0], cells, cells)
    targets[:, :height, :width] = boundary_targets(record.labels, (height, width))
    pairs, together, counted = _pairs(record.labels, (-(-height // 2), -(-width // 2)), cells // 2, rng)
    embedding = record.embeddings[side]
    if augment and rng.random() < _BRIGHTENED:
        image = (image * rng.uniform(*_BRIGHTNESS)).clamp(0, 1)
    if augment and rng.random() < _MIRRORED:
        embedding, image, targets, valid = (one.flip(-1) for one in (embedding, image, targets, valid))
        row, column = pairs // (cells // 2), pairs % (cells // 2)
        pairs = row * (cells // 2) + cells // 2 - 1 - column
    return embedding, image, targets, valid, pairs, together, counted


def _pairs(
    labels: Tensor, size: tuple[int, int], cells: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of an image's cells of ``size`` in a grid of ``cells`` a side, most of them near each other."""
    radius = np.where(rng.random(_PAIRS) < _NEAR_SHARE, max(2, cells // _NEAR), cells)
    places = []
    for length in size:
        first = rng.integers(length, size=_PAIRS)
        second = (first + np.rint(rng.uniform(-1, 1, _PAIRS) * radius)).astype(np.int64).clip(0, length - 1)
        places.append(torch.from_numpy(np.stack([first, second])))  # (2, P)
    rows, columns = places
    found = nearest_labels(labels, size)[:, rows, columns]  # (L, 2, P)
    together = (found[:, 0] == found[:, 1]).float().mean(0)  # (P,)
    counted = (found >= 0).all(0).all(0).float()  # (P,)
    return rows * cells + columns, together, counted


# ------------------------------------------------------------------------------------------- loss, validation


def head_loss(output: HeadOutput, batch: HeadBatch) -> Tensor:
    """The loss of a batch: cross entropy of the boundaries, and half that of the affinities of pairs.

    Two cells with affinities a and b are said to lie in one region of a share ``exp(-|a - b|^2)`` of the maps.
    """
    weights = torch.tensor(_BOUNDARY_WEIGHTS, device=batch.targets.device)[:, None, None]  # (L, 1, 1)
    cells = functional.binary_cross_entropy_with_logits(
        output.boundaries, batch.targets, reduction="none", pos_weight=weights
    )
    boundary = (cells * batch.valid).sum() / (batch.valid.sum() * LEVELS)
    flat = output.affinities.flatten(2)  # (B, D, q / 2 * q / 2)
    first, second = (flat.gather(2, one[:, None].expand(-1, flat.shape[1], -1)) for one in batch.pairs.unbind(1))
    share = torch.exp(-((first - second) ** 2).sum(1)).clamp(_SURE, 1 - _SURE)  # (B, P)
    pairs = functional.binary_cross_entropy(share, batch.together, reduction="none")
    affinity = (pairs * batch.counted).sum() / batch.counted.sum().clamp(min=1)
    return boundary + _AFFINITY_WEIGHT * affinity


@torch.no_grad()
def validate(
    head: BoundaryHead, records: Sequence[Path], sides: Sequence[int], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """How well a head finds the boundaries of images that it was not trained on.

    Args:
        head: on the device.
        records: of the images; the first few are looked at.
        sides: SAM's sides, all of which count alike.
        device: where the head is.

    Returns:
        ``correlation`` of the boundary strength with the share of the maps that have a boundary in a cell, and
        ``boundary_f``, the harmonic mean of precision and recall of cells of the strength above a threshold (the best
        one) and cells of the finest map's boundaries, where a cell counts as found within .0075 of the image's
        diagonal, along rows and columns: :func:`..evaluation.boundary_scores` is exact, but takes a distance transform
        for each threshold. The cells of all images count alike.
    """
    head.eval()
    sums = torch.zeros(5, dtype=torch.float64)  # of x, y, xx, yy, xy
    cells, found = 0, torch.zeros(4, len(_THRESHOLDS), dtype=torch.float64)
    thresholds = torch.tensor(_THRESHOLDS)[:, None, None]  # (T, 1, 1)
    for path in records[:VALIDATED]:
        record = read_record(path, sides)
        for side in sides:
            batch = make_batch([record], side, np.random.default_rng(0), augment=False)
            moved = move_to_device(batch, device)
            strength = boundary_strength(head(moved.embedding.float(), moved.image).boundaries).cpu()
            height, width = record.images[side].shape[1:]
            x, target = strength[0, :height, :width].double(), batch.targets[0, :, :height, :width]
            y = target.double().mean(0)
            sums += torch.stack([one.sum() for one in (x, y, x * x, y * y, x * y)])
            cells += x.numel()
            radius = round(tolerance_of((height, width)))
            said, true = (x >= thresholds).float(), target[-1:]  # (T, h, w), (1, h, w)
            found += torch.stack(
                [
                    (said * _grown(true, radius)).sum((1, 2)),
                    said.sum((1, 2)),
                    (true * _grown(said, radius)).sum((1, 2)),
                    true.sum((1, 2)).expand(len(_THRESHOLDS)),
                ]
            ).double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (sums / cells).tolist()
    spread = max(mean_xx - mean_x**2, 0.0) * max(mean_yy - mean_y**2, 0.0)
    correlation = (mean_xy - mean_x * mean_y) / spread**0.5 if spread > 0 else 0.0
    precision, recall = found[0] / found[1].clamp(min=1), found[2] / found[3].clamp(min=1)  # (T,)
    scores = 2 * precision * recall / (precision + recall).clamp(min=_SURE)
    return {"correlation": round(correlation, 4), "boundary_f": round(float(scores.max()), 4)}


def _grown(cells: Tensor, radius: int) -> Tensor:
    """Cells (T, h, w) of {0, 1} and all within ``radius`` of them, along rows and columns."""
    return functional.max_pool2d(cells, 2 * radius + 1, stride=1, padding=radius)
