"""``lavis-svp segment``: messages without weights, and the shipped weights at work."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_svp.cli import segment
from lavis_svp.models.outputs import NoAnswer


def run(*arguments, cwd):
    command = [sys.executable, "-m", "lavis_svp.cli", "segment", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_without_a_checkpoint_it_says_how_to_make_one(tmp_path):
    result = run("the red circle", "--checkpoint", str(tmp_path / "none"), cwd=tmp_path)
    assert result.returncode == 2
    assert "bash run_scripts/train.sh" in result.stderr and "Traceback" not in result.stderr


def test_the_default_is_the_shipped_weights_and_their_absence_is_told(tmp_path, monkeypatch, capsys):
    from lavis_svp.zoo import shipped

    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as stop:
        segment.main(["the red circle", "--out", str(tmp_path / "demo.png")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "svp_ris_tiny" in said and "bash run_scripts/train.sh" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "weights"),
    [(["the cup"], "svp_ris_tiny_photos"), (["the red circle", "--model-type", "tiny"], "svp_ris_tiny")],
)
def test_the_shipped_weights_segment_at_once(tmp_path, words, weights):
    result = run(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"Weights: {weights}, shipped with the package" in result.stdout and "Answer:" in result.stdout
    assert (tmp_path / "output/demo.png").stat().st_size > 10_000


def test_without_an_expression_it_shows_the_usage(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 2 and "EXPRESSION" in result.stderr.upper()


class SetModel:
    """Answers with what was set."""

    options = SimpleNamespace(sam=SimpleNamespace(side=64), reads_classes=False)
    device = torch.device("cpu")
    timed_parts: dict[str, torch.nn.Module | None] = {}

    def __init__(self, error):
        self.error = error

    def predict_masks(self, samples):
        return [[SimpleNamespace(error=self.error)]]

    def predict_answers(self, samples, **options):
        return [NoAnswer(self.error)]


class NotingModel(SetModel):
    """Answers with a mask, and a note."""

    def predict_masks(self, samples):
        answer = {"text": "[SEG]", "mask": np.ones((8, 8), np.uint8), "region_map": None, "tokens": 3, "score": 0.5}
        return [[SimpleNamespace(error=None, note=self.error, **answer)]]


@pytest.mark.parametrize("note", ["", 'I do not know the word "mitten".'])
def test_a_note_is_told_and_drawn(tmp_path, monkeypatch, capsys, note):
    captions = []
    monkeypatch.setattr(segment, "_shipped_model", lambda place, model_type: NotingModel(note))
    monkeypatch.setattr(
        "lavis_svp.common.visualization.panel",
        lambda *args, caption: captions.append(caption) or Image.new("RGB", (8, 8)),
    )
    segment.main(["the red mitten", "--device", "cpu", "--out", str(tmp_path / "demo.png")])
    said = capsys.readouterr().out
    if note:
        assert f"Answer: [SEG]\nNote: {note}\n" in said
        assert captions == [f'"the red mitten": [SEG] Note: {note}']
    else:
        assert "Note" not in said and captions == ['"the red mitten": [SEG]']


@pytest.mark.parametrize("flags", [[], ["--question"]])
def test_no_answer_is_an_error(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(segment, "_shipped_model", lambda place, model_type: SetModel("it is too long"))
    monkeypatch.setattr(segment, "_trained_model", lambda path, place: SetModel("it is too long"))
    with pytest.raises(SystemExit) as stop:
        segment.main(["the red circle", *flags, "--device", "cpu", "--out", str(tmp_path / "demo.png")])
    assert stop.value.code == 2 and "error: it is too long\n" in capsys.readouterr().err
    assert not (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(("limit", "message"), [("99", "max-image-pixels"), ("many", "must be at least 1")])
def test_the_limit_of_pixels_is_an_option(tmp_path, capsys, limit, message):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stop:
        segment.main([str(tmp_path / "a.png"), "the red circle", "--max-image-pixels", limit, "--device", "cpu"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_checkpoint_without_configuration_is_told(tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(SystemExit) as stop:
        segment.main(["cup", "--checkpoint", str(tmp_path / "a.pth"), "--device", "cpu"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "a.pth" in said and "Traceback" not in said


@pytest.mark.parametrize(("reads_classes", "told"), [(True, "scikit-image"), (False, "a RefShapes scene")])
def test_the_built_in_image_is_one_that_the_model_knows(tmp_path, monkeypatch, capsys, reads_classes, told):
    seen = []
    model = NotingModel("")
    model.options = SimpleNamespace(sam=SimpleNamespace(side=64), reads_classes=reads_classes)
    monkeypatch.setattr(segment, "_shipped_model", lambda place, model_type: model)
    monkeypatch.setattr(
        "lavis_svp.common.visualization.panel",
        lambda pixels, *args, caption: seen.append(pixels) or Image.new("RGB", (8, 8)),
    )
    segment.main(["the cup", "--device", "cpu", "--out", str(tmp_path / "demo.png")])
    assert f"No image given: {told}" in capsys.readouterr().err
    assert seen[0].ndim == 3 and (seen[0].shape == (300, 451, 3)) == reads_classes


def test_the_model_type_is_asked_for(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        segment, "_shipped_model", lambda place, model_type: asked.append(model_type) or NotingModel("")
    )
    monkeypatch.setattr("lavis_svp.common.visualization.panel", lambda *args, caption: Image.new("RGB", (8, 8)))
    segment.main(["the cup", "--device", "cpu", "--out", str(tmp_path / "a.png")])
    segment.main(["the cup", "--model-type", "tiny", "--device", "cpu", "--out", str(tmp_path / "a.png")])
    assert asked == ["tiny_photos", "tiny"]


def test_an_unknown_model_type_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        segment.main(["the cup", "--model-type", "huge", "--device", "cpu", "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "huge" in said and "tiny_photos" in said
