"""How exactly a run computes, what DDP looks for, and how long processes wait for each other."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import distributed, nn
from torch.backends import cudnn

from lavis_svp.compat.patches import init_distributed_mode
from lavis_svp.runners.distributed import limit_waiting, set_numerics
from lavis_svp.runners.options import RunOptions
from lavis_svp.runners.runner_svp import BatchesOnDevice, compile_parts, finds_unused

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OPTIONS = RunOptions(task="t", output_dir="o")


@pytest.fixture
def numerics(monkeypatch):
    """Puts back what the test changes."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    set_numerics(CPU, OPTIONS)


def flags():
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.get_float32_matmul_precision(),
    )


def test_a_cpu_computes_in_fp32_whatever_is_set(numerics):
    set_numerics(CPU, OPTIONS)
    assert flags() == (False, False, False, "highest")
    set_numerics(CPU, replace(OPTIONS, deterministic=True))
    assert flags() == (True, True, False, "highest")


def test_cuda_computes_fast_or_exactly(numerics):
    import os

    set_numerics(CUDA, OPTIONS)
    assert flags() == (False, False, True, "high") and cudnn.allow_tf32
    set_numerics(CUDA, replace(OPTIONS, tf32=False))
    assert flags() == (False, False, True, "highest") and not cudnn.allow_tf32
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_numerics(CUDA, replace(OPTIONS, deterministic=True))
    assert flags() == (True, True, False, "high") and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


class AlignedModel(nn.Module):
    def __init__(self, alignment_steps):
        super().__init__()
        self.auxiliary_losses = SimpleNamespace(options=SimpleNamespace(alignment_steps=alignment_steps))


@pytest.mark.parametrize(
    ("model", "device", "options", "step", "expected"),
    [
        (AlignedModel(100), CUDA, {}, 0, True),
        (AlignedModel(100), CUDA, {}, 99, True),
        (AlignedModel(100), CUDA, {}, 100, False),
        (AlignedModel(0), CUDA, {}, 0, False),
        (AlignedModel(0), CUDA, {"deterministic": True}, 0, True),
        (AlignedModel(0), CPU, {}, 0, True),
        (nn.Linear(1, 1), CUDA, {}, 0, True),
        (AlignedModel(100), CUDA, {"find_unused_parameters": False}, 0, False),
        (AlignedModel(0), CUDA, {"find_unused_parameters": True}, 0, True),
    ],
)
def test_unused_parameters_are_looked_for_where_there_may_be_some(model, device, options, step, expected):
    assert finds_unused(model, device, replace(OPTIONS, **options), step) is expected


def test_a_model_that_names_no_parts_cannot_be_compiled():
    with pytest.raises(ValueError, match="Linear has no compile_parts"):
        compile_parts(nn.Linear(1, 1))
    calls = []
    model = nn.Linear(1, 1)
    model.compile_parts = lambda: calls.append(1)
    compile_parts(model)
    assert calls == [1]


def test_batches_come_on_the_device():
    loader = BatchesOnDevice([{"x": torch.ones(2), "names": ["a"]}], torch.device("meta"))
    assert len(loader) == 1
    (batch,) = loader
    assert batch["x"].device.type == "meta" and batch["names"] == ["a"]


def wait_for_a_lost_process(arguments):
    """Two processes: during the preparation one is late by a second; after it, one never comes."""
    import os

    run = OmegaConf.create({"device": "cpu"})
    init_distributed_mode(run, silence=lambda main: None)
    late = run.rank == 1
    if late:
        time.sleep(1)
    distributed.barrier()  # in the preparation, which may take longer than any step
    limit_waiting(timedelta(seconds=0.5))
    start = time.monotonic()
    if late:
        time.sleep(4)
        os._exit(0)
    try:
        distributed.barrier()
    except RuntimeError:
        print(f"gave up after {time.monotonic() - start:.1f} s", flush=True)
        os._exit(0)


def test_a_lost_process_ends_the_wait_of_the_others(tmp_path, run_toy):
    assert run_toy(tmp_path, processes=2, main=wait_for_a_lost_process) == [0, 0]
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("gave up after")]
    assert 0.3 < float(line.split()[3]) < 3


def test_one_process_has_nobody_to_wait_for():
    limit_waiting()
