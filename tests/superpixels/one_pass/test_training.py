"""Training a boundary head: batches and loss against slow references, resuming, validation, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lavis_svp.common.files import BadFileError
from lavis_svp.superpixels.one_pass import training
from lavis_svp.superpixels.one_pass.head import LEVELS, BoundaryHead, HeadOutput
from lavis_svp.superpixels.one_pass.labels import HeadRecord, boundary_targets, nearest_labels
from lavis_svp.superpixels.one_pass.training import (
    HeadTraining,
    head_loss,
    held_out,
    make_batch,
    train_head,
    validate,
)

OPTIONS = HeadTraining(steps=24, batch_size=2, sides=(64, 96))
EVERY = 8


def record(seed: int, sides: tuple[int, ...] = (64, 96)) -> HeadRecord:
    """An image of two colours, whose border lies somewhere; 3/4 of SAM's input high."""
    rng = np.random.default_rng(seed)
    border, colours = rng.uniform(0.25, 0.75), torch.from_numpy(rng.integers(0, 256, (2, 3)))
    labels = (torch.arange(16) >= round(border * 16)).to(torch.int16).expand(LEVELS, 12, 16).contiguous()
    labels[0] = 0
    images, embeddings = {}, {}
    for side in sides:
        right = nearest_labels(labels[-1:], (side * 3 // 16, side // 4))[0].long()
        images[side] = colours[right].permute(2, 0, 1).to(torch.uint8).contiguous()
        embeddings[side] = torch.from_numpy(rng.normal(size=(256, side // 16, side // 16))).half()
    return HeadRecord(labels, embeddings, images)


@pytest.fixture
def records(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "records" / f"{number}.safetensors" for number in range(6)]
    for number, file in enumerate(files):
        record(number).save(file)
    return files


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("saves", [0, 1, 2])
def test_a_run_that_was_killed_gives_the_same_head(
    records: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    whole = train_head(records, tmp_path / "whole", OPTIONS, save_every=EVERY, progress=False)
    save, left = training.save_checkpoint, [saves]

    def killed_in_a_save(path: Path, state: dict[str, Any]) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", killed_in_a_save)
        with pytest.raises(Killed):
            train_head(records, tmp_path / "killed", OPTIONS, save_every=EVERY, progress=False)
    resumed = train_head(records, tmp_path / "killed", OPTIONS, save_every=EVERY, progress=False)
    assert equal_states(whole.head, resumed.head) and whole.history == resumed.history
    again = train_head(records, tmp_path / "killed", OPTIONS, progress=False)  # nothing is left to do
    assert equal_states(whole.head, again.head) and again.history == whole.history


def test_the_seed_makes_the_head_and_torchs_own_is_left_alone(records: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    heads = [
        train_head(records, tmp_path / str(number), HeadTraining(20, 2, (64,), seed), progress=False).head
        for number, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.rand(1), expected)
    assert equal_states(heads[0], heads[1]) and not equal_states(heads[0], heads[2])


def test_it_learns_to_see_borders(tmp_path: Path) -> None:
    files = [tmp_path / f"{number:02d}.safetensors" for number in range(30)]
    for number, file in enumerate(files):
        one = record(number, (64,))
        one.embeddings[64].zero_()  # what can be learnt lies in the image
        one.save(file)
    found = train_head(files, tmp_path / "out", HeadTraining(80, 6, (64,)), progress=False).history[-1]
    assert found["correlation"] > 0.5 and found["boundary_f"] > 0.8


def test_a_checkpoint_of_other_settings_is_refused(records: list[Path], tmp_path: Path) -> None:
    train_head(records, tmp_path, OPTIONS, progress=False)
    with pytest.raises(ValueError, match=r"begun with steps 24 \(now 30\)"):
        train_head(records, tmp_path, HeadTraining(30, 2, (64, 96)), progress=False)
    with pytest.raises(ValueError, match="begun with other images"):
        train_head(records[1:], tmp_path, OPTIONS, progress=False)
    with pytest.raises(ValueError, match="begun with another SAM"):
        train_head(records, tmp_path, OPTIONS, progress=False, upscaler=BoundaryHead().upscaler)
    (tmp_path / training.CHECKPOINT).write_bytes(b"no archive")
    with pytest.raises(BadFileError, match="Delete it to train the head from the start"):
        train_head(records, tmp_path, OPTIONS, progress=False)


def test_the_up_scaler_is_taken_over_and_stays_as_it_is(records: list[Path], tmp_path: Path) -> None:
    upscaler = BoundaryHead().upscaler
    head = train_head(records, tmp_path, HeadTraining(20, 2, (64,)), progress=False, upscaler=upscaler).head
    trained = head.upscaler.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in upscaler.state_dict().items())


def test_no_record_is_an_error_and_a_single_one_is_trained_on(records: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record"):
        train_head([], tmp_path, OPTIONS, progress=False)
    assert held_out(records[:1]) == (records[:1], [])
    assert not train_head(records[:1], tmp_path, HeadTraining(20, 2, (64,)), progress=False).history


def test_a_loss_that_is_not_finite_is_an_error(
    records: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "head_loss", lambda output, batch: output.boundaries.sum() * torch.nan)
    with pytest.raises(ValueError, match="The loss is nan at step"):
        train_head(records, tmp_path, OPTIONS, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 19}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"sides": (100,)}, "multiple of 16, got 100"),
        ({"sides": ()}, "at least one"),
        ({"sides": (64, 64)}, "different"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadTraining(**options)


def test_larger_sides_get_fewer_images() -> None:
    assert [HeadTraining(batch_size=8).images_at(side) for side in (384, 512, 768, 1024)] == [8, 4, 2, 1]


# ---------------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_what_the_records_say() -> None:
    one = record(3)
    batch = make_batch([one], 64, np.random.default_rng(0), augment=False)
    assert torch.equal(batch.embedding[0], one.embeddings[64])
    assert torch.allclose(batch.image[0, :, :12] * 255, one.images[64].float()) and not batch.image[0, :, 12:].any()
    assert torch.equal(batch.targets[0, :, :12], boundary_targets(one.labels, (12, 16)))
    assert batch.valid[0, 0, :12].all() and not batch.valid[0, 0, 12:].any()
    cells = nearest_labels(one.labels, (6, 8))
    for first, second, together in zip(*batch.pairs[0], batch.together[0], strict=True):
        a, b = cells[:, first // 8, first % 8], cells[:, second // 8, second % 8]
        assert float((a == b).float().mean()) == pytest.approx(float(together))
    assert batch.counted.all()


def test_pairs_with_a_cell_in_no_region_do_not_count() -> None:
    one = record(3)
    one.labels[:, :, :8] = -1
    batch = make_batch([one], 64, np.random.default_rng(0))
    assert 0 < batch.counted.mean() < 1


def test_mirroring_takes_everything_along() -> None:
    """A mirrored image of a head that is mirrored, too, has the same loss."""
    one, rng = record(3), np.random.default_rng(0)
    batches = [make_batch([one], 64, rng) for _ in range(20)]
    plain = boundary_targets(one.labels, (12, 16))
    mirrored = [batch for batch in batches if not torch.equal(batch.targets[0, :, :12], plain)]
    assert 0 < len(mirrored) < len(batches)
    cells = nearest_labels(one.labels, (6, 8)).flip(-1)
    for batch in mirrored:
        assert torch.equal(batch.targets[0, :, :12], plain.flip(-1))
        assert torch.equal(batch.embedding[0], one.embeddings[64].flip(-1))
        rows, columns = batch.pairs[0] // 8, batch.pairs[0] % 8
        found = cells[:, rows, columns]  # (L, 2, P)
        assert torch.allclose((found[:, 0] == found[:, 1]).float().mean(0), batch.together[0])


def test_the_loss_is_that_of_a_slow_reference() -> None:
    one = record(1)
    one.labels[:, :3] = -1
    batch = make_batch([one, record(2)], 64, np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    output = HeadOutput(
        torch.randn(2, LEVELS, 16, 16, generator=generator), torch.randn(2, 4, 8, 8, generator=generator) * 0.5
    )
    boundary, cells = 0.0, 0
    for image, level, row, column in np.ndindex(2, LEVELS, 16, 16):
        if batch.valid[image, 0, row, column]:
            share = 1 / (1 + math.exp(-float(output.boundaries[image, level, row, column])))
            true = float(batch.targets[image, level, row, column])
            weight = (4.0, 3.0, 2.5, 2.0, 2.0)[level]
            boundary -= weight * true * math.log(share) + (1 - true) * math.log(1 - share)
            cells += 1
    affinity, pairs = 0.0, 0
    for image, pair in np.ndindex(2, batch.pairs.shape[2]):
        if batch.counted[image, pair]:
            a, b = (
                output.affinities[image, :, int(place) // 8, int(place) % 8] for place in batch.pairs[image, :, pair]
            )
            share = min(max(math.exp(-float(((a - b) ** 2).sum())), 1e-4), 1 - 1e-4)
            true = float(batch.together[image, pair])
            affinity -= true * math.log(share) + (1 - true) * math.log(1 - share)
            pairs += 1
    expected = boundary / cells + 0.5 * affinity / pairs
    assert float(head_loss(output, batch)) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------- validation


class KnowsAll(nn.Module):
    """Says of records in turn what their labels are, or the opposite."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign, self.seen = sign, 0

    def forward(self, embedding: Tensor, image: Tensor) -> HeadOutput:
        side = image.shape[-1] * 4
        batch = make_batch([record(self.seen)], side, np.random.default_rng(0), augment=False)
        self.seen += 1
        return HeadOutput(self.sign * 20 * (2 * batch.targets - 1), torch.zeros(1, 1, 1, 1))


def test_who_knows_the_labels_is_right(records: list[Path]) -> None:
    assert validate(KnowsAll(1.0), records, [64]) == {"correlation": 1.0, "boundary_f": 1.0}  # type: ignore[arg-type]
    assert validate(KnowsAll(-1.0), records, [64])["correlation"] == -1.0  # type: ignore[arg-type]


def test_blank_images_correlate_with_nothing(tmp_path: Path) -> None:
    one = record(0)
    one.labels.zero_()
    one.save(tmp_path / "blank.safetensors")
    found = validate(KnowsAll(1.0), [tmp_path / "blank.safetensors"], [64])  # type: ignore[arg-type]
    assert found == {"correlation": 0.0, "boundary_f": 0.0}
