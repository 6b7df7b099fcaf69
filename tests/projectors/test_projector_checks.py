"""The checks of every projector: run on the document's example as a user would, and able to fail."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import projector_checks as checks
import pytest
import torch

from lavis_svp.projectors import VisualTokens, build_projector
from lavis_svp.projectors.base import PROJECTORS
from lavis_svp.projectors.baselines.mlp import MlpProjector

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(tmp_path):
    """The folder with the two files of the document's example."""
    text = (ROOT / "docs" / "projectors.md").read_text()
    files = re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in files] == ["strided.py", "test_strided.py"]
    for name, content in files:
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_documents_example_passes_every_check(example, monkeypatch):
    monkeypatch.setattr(PROJECTORS, "_entries", dict(PROJECTORS._entries))  # so that the name is gone afterwards
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.syspath_prepend(example)
    importlib.import_module("strided")
    test = importlib.import_module("test_strided")
    for check in checks.CHECKS:
        test.test_strided(check, step=3)
    assert build_projector("strided", vision_dim=8, llm_dim=4, grid=(24, 24)).num_tokens((24, 24)) == 36


@pytest.mark.slow
def test_the_documents_example_runs_under_pytest(example):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_strided.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/projectors", example)))}
    done = subprocess.run(command, cwd=example, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{2 * len(checks.CHECKS)} passed" in done.stdout


def leaks_batch(self, features, superpixels):
    result = MlpProjector.project(self, features, superpixels)
    return VisualTokens(result.tokens + features.patches.shape[1], result.valid, result.assignment)


def reads_padding(self, features, superpixels):
    result = MlpProjector.project(self, features, superpixels)
    return VisualTokens(result.tokens + features.patches.mean(), result.valid, result.assignment)


def changes_input(self, features, superpixels):
    features.patches.add_(1.0)
    return MlpProjector.project(self, features, superpixels)


def counts_wrongly(self, features, superpixels):
    result = MlpProjector.project(self, features, superpixels)
    return VisualTokens(result.tokens[:, 1:], result.valid[:, 1:], None)


def assigns_wrongly(self, features, superpixels):
    result = MlpProjector.project(self, features, superpixels)
    return VisualTokens(result.tokens, result.valid, 2 * result.assignment)


def asks_the_device(self, features, superpixels):
    int(features.valid.sum())
    return MlpProjector.project(self, features, superpixels)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (leaks_batch, checks.check_independence),
        (reads_padding, checks.check_padding_content),
        (changes_input, checks.check_inputs),
        (counts_wrongly, checks.check_token_count),
        (assigns_wrongly, checks.check_output),
        (asks_the_device, checks.check_meta_device),
    ],
)
def test_each_fault_is_found(monkeypatch, fault, check):
    broken = type("Broken", (MlpProjector,), {"project": fault})
    monkeypatch.setattr(checks, "build_projector", lambda name, **sizes: broken(**sizes))
    with pytest.raises((AssertionError, RuntimeError)):
        check("mlp")


def test_an_idle_parameter_and_a_hidden_state_are_found(monkeypatch):
    class Idle(MlpProjector):
        def __init__(self, *sizes, **named):
            super().__init__(*sizes, **named)
            self.unused = torch.nn.Linear(2, 2)
            self.hidden = torch.rand(1).item()

        def project(self, features, superpixels):
            result = super().project(features, superpixels)
            return VisualTokens(result.tokens + self.hidden, result.valid, result.assignment)

    monkeypatch.setattr(checks, "build_projector", lambda name, **sizes: Idle(**sizes))
    with pytest.raises(AssertionError, match=r"no gradient in unused.weight, unused.bias"):
        checks.check_gradients("mlp")
    with pytest.raises(AssertionError, match="state dict"):
        checks.check_state_dict("mlp")
