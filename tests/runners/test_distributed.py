"""How exactly a run computes, what DDP looks for, and how long processes wait for each other."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
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
    def __init__(self, alignment_steps, word_alignment=0.0):
        super().__init__()
        options = SimpleNamespace(alignment_steps=alignment_steps, word_alignment=word_alignment)
        self.auxiliary_losses = SimpleNamespace(options=options)


@pytest.mark.parametrize(
    ("model", "device", "options", "step", "expected"),
    [
        (AlignedModel(100), CUDA, {}, 0, True),
        (AlignedModel(100), CUDA, {}, 99, True),
        (AlignedModel(100), CUDA, {}, 100, False),
        (AlignedModel(0), CUDA, {}, 0, False),
        (AlignedModel(0, word_alignment=0.5), CUDA, {}, 0, True),
        (AlignedModel(0), CUDA, {"deterministic": True}, 0, True),
        (AlignedModel(0), CPU, {}, 0, True),
        (nn.Linear(1, 1), CUDA, {}, 0, True),
        (AlignedModel(100), CUDA, {"find_unused_parameters": False}, 0, False),
        (AlignedModel(0), CUDA, {"find_unused_parameters": True}, 0, True),
    ],
)
def test_unused_parameters_are_looked_for_where_there_may_be_some(model, device, options, step, expected):
    assert finds_unused(model, device, replace(OPTIONS, **options), step) is expected


RECIPES = {
    "paper": {},
    "tiny": {
        "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
        "auxiliary_losses": {"grounding": 1.0, "point_regression": 1.0},
        "visual_tokens": {"norm": True, "shuffle": True},
    },
    "lora": {"language": {"tuning": "lora", "train_embeddings": "all", "gradient_checkpointing": True}},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["masks", "no target", "words"])
def test_every_trainable_parameter_gets_a_gradient_from_every_batch(make_model, batch, recipe, kind):
    """So DDP need not look for others; the batches: masks, expressions of nothing alone, questions alone."""
    model = make_model(**RECIPES[recipe])
    if kind == "no target":
        batch["has_target"] = [[False] * len(row) for row in batch["masks"]]
        batch["masks"] = [[np.zeros_like(mask) for mask in row] for row in batch["masks"]]
    elif kind == "words":
        batch = {key: batch[key] for key in ("image", "original_size")}
        batch |= {"text_input": [["what colour?"], ["how many?"]], "text_output": [["red"], ["two"]]}
    model(batch)["loss"].backward()
    assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []


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
    """Two processes: during the preparation one is late; after it, one never comes."""
    import os

    run = OmegaConf.create({"device": "cpu"})
    init_distributed_mode(run, silence=lambda main: None)
    late = run.rank == 1
    if late:
        time.sleep(0.8)
    distributed.barrier()  # in the preparation, which may take longer than any step
    limit_waiting(timedelta(seconds=0.5))
    start = time.monotonic()
    if late:
        time.sleep(2.5)
        os._exit(0)
    try:
        distributed.barrier()
    except RuntimeError:
        print(f"gave up after {time.monotonic() - start:.1f} s", flush=True)
        os._exit(0)


def test_a_lost_process_ends_the_wait_of_the_others(tmp_path, run_toy):
    assert run_toy(tmp_path, processes=2, main=wait_for_a_lost_process) == [0, 0]
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("gave up after")]
    assert 0.3 < float(line.split()[3]) < 2.4


def test_one_process_has_nobody_to_wait_for():
    limit_waiting()
