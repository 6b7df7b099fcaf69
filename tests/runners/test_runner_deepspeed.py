"""runner_deepspeed with the toy model: real DeepSpeed engines, two gloo processes, every ZeRO stage."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("deepspeed")

QUIET = ("model.noisy=False", "datasets.toy_data.type=plain", "model.dropout=0.0", "model.norm=False")
STAGES = [0, 1, 2, 3]
slow = pytest.mark.slow


def options(stage, bf16=False):
    """ZeRO-3 needs batches that run every part of the model, which the noisy toy's do not."""
    always = ("run.runner=runner_deepspeed", f"run.deepspeed_config.zero_optimization.stage={stage}")
    return (
        *always,
        *(("model.noisy=False",) if stage == 3 else ()),
        *(("run.amp=True", "run.amp_dtype=bf16") if bf16 else ()),
    )


def largest_difference(a, b):
    assert a["model"].keys() == b["model"].keys()
    return max(float((a["model"][name] - b["model"][name]).abs().max()) for name in a["model"])


def distance_travelled(toy, state):
    """How far training moved the weights: what differences are to be compared with."""
    return max(float(tensor.abs().max()) for tensor in state["model"].values())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Runs that several tests compare with, each done once."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def reference(shared, run_toy, final_state):
    """reference(name, *options, processes=2): the final state of an undisturbed run."""

    def get(name, *arguments, processes=2):
        if not (shared / name / "out").exists():
            run_toy(shared / name, *arguments, processes=processes)
        return final_state(shared / name)

    return get


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=slow) for s in (0, 1, 3)), 2])
def test_fp32_training_is_that_of_runner_svp(reference, stage):
    """Batches leave out parts of the model in some processes only (not under ZeRO-3).

    The quiet toy of ZeRO-3 never uses ``seldom``: ZeRO decays such a parameter, plain AdamW passes over it.
    """
    quiet = ("model.noisy=False", "run.weight_decay=0")
    name, more = ("quiet", quiet) if stage == 3 else ("", ())
    ours = reference(f"zero{stage}{name}", *options(stage), *more)
    theirs = reference(f"ddp{name}", *more)
    assert largest_difference(ours, theirs) < 2e-5
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=slow), 2, pytest.param(3, marks=slow)])
def test_bf16_on_two_processes_follows_a_single_one(reference, run_toy, final_state, tmp_path, stage):
    single = reference("single", *QUIET, "run.batch_size_train=8", processes=1)
    run_toy(tmp_path, *options(stage, bf16=True), *QUIET, processes=2)
    ours = final_state(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in ours["model"].values())  # the masters, not the bf16 copies
    assert 0 < largest_difference(ours, single) < 0.01  # weights moved by up to 0.15


@pytest.mark.parametrize(
    ("stage", "bf16", "kill"),
    [
        (1, False, "save:3@0"),
        (2, True, "micro:17@1"),
        (3, False, "evaluation:5@1"),
        *(pytest.param(s, b, "micro:17@1", marks=slow) for s, b in ((0, False), (1, True), (2, False), (3, True))),
        *(pytest.param(s, True, "save:3@0", marks=slow) for s in (2, 3)),
        *(pytest.param(s, s == 2, "evaluation:5@0", marks=slow) for s in (1, 2)),
    ],
)
def test_one_process_killed_and_all_started_again_ends_the_same(
    tmp_path, run_toy, final_state, same_training, reference, stage, bf16, kill
):
    norm = () if not bf16 else ("model.norm=False",)  # torch's batch norm does not take bf16 parameters on a CPU
    arguments = (*options(stage, bf16), *norm)
    whole = reference(f"zero{stage}{'_bf16' if bf16 else ''}", *arguments)
    assert run_toy(tmp_path, *arguments, kill=kill, processes=2) != [0, 0]
    assert not (tmp_path / "out/checkpoint_12.pth").exists()
    run_toy(tmp_path, *arguments, processes=2)
    same_training(final_state(tmp_path), whole)
    assert (tmp_path / "out/result/metrics_test_12.json").exists()


def test_a_checkpoint_goes_on_under_another_stage_world_size_and_runner(tmp_path, run_toy, final_state, reference):
    """Six steps under ZeRO-2 on two processes, three under ZeRO-3 on one, three with runner_svp on one.

    Without decay: ZeRO decays parameters that never had a gradient, plain AdamW passes over them.
    """
    whole = reference("quiet", *QUIET, "run.weight_decay=0", processes=2)
    ends = (
        "run.weight_decay=0",
        "run.iters_per_inner_epoch=3",
        "run.eval_every=0",
        "run.save_every=0",
        "run.keep_checkpoints=9",
    )
    run_toy(tmp_path, *options(2), *QUIET, *ends, kill="micro:22", processes=2)
    assert (tmp_path / "out/checkpoint_6.pth").exists()
    one = ("run.accum_grad_iters=6",)  # the same samples in each step
    run_toy(tmp_path, *options(3), *QUIET, *ends, *one, kill="micro:22", processes=1)
    assert (tmp_path / "out/checkpoint_9.pth").exists()
    run_toy(tmp_path, *QUIET, *ends, *one, processes=1)
    assert largest_difference(final_state(tmp_path), whole) < 2e-5


def test_all_processes_save_the_best_checkpoint(tmp_path, run_toy, reference, shared):
    """The main process alone knows the metrics; a save that only it made would wait for ever under ZeRO-3."""
    reference("zero3", *options(3))
    best = torch.load(shared / "zero3/out/checkpoint_best.pth", weights_only=True)
    results = shared / "zero3/out/result"
    scores = {n: json.loads((results / f"metrics_val_{n}.json").read_text())["agg_metrics"] for n in (4, 8, 12)}
    assert best["iters"] == max(scores, key=scores.get)
    run_toy(
        tmp_path, *options(3), "run.test_checkpoint=best", "run.max_iters=4", "run.iters_per_inner_epoch=4", processes=2
    )
    assert (tmp_path / "out/result/metrics_test_4.json").exists()


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, run_toy, final_state):
    steps = ("run.max_iters=4", "run.iters_per_inner_epoch=4", "run.init_lr=1e30", "run.eval_every=0")
    for stage in (0, 2):
        folder = tmp_path / str(stage)
        run_toy(folder, *options(stage), *QUIET, *steps, check=False)
        log = (folder / "log").read_text()
        assert "this update is skipped" in log or "not finite" in log


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("run.deepspeed_config.train_micro_batch_size_per_gpu=3",), "batch_size_train is 4"),
        (("run.deepspeed_config.gradient_clipping=5.0",), "grad_clip is 1.0"),
        (("run.deepspeed_config.zero_optimisation.stage=2",), "did you mean 'zero_optimization'"),
    ],
)
def test_contradictions_end_the_run_with_a_message(tmp_path, run_toy, given, words):
    run_toy(tmp_path, "run.runner=runner_deepspeed", *given, processes=1, check=False)
    assert words in (tmp_path / "log").read_text()
