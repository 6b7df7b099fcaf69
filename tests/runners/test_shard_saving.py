"""Sharded checkpoints of real DeepSpeed engines: the same as whole ones, resumable anywhere, never half."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("deepspeed")

from lavis_svp.common.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint
from lavis_svp.common.zero_shards import read_zero_folder

slow = pytest.mark.slow
SHORT = ("run.max_iters=2", "run.warmup_steps=1", "run.eval_every=0", "run.valid_splits=[]", "run.test_splits=[]")
LONG = ("run.max_iters=6", "run.eval_every=0", "run.valid_splits=[]", "run.test_splits=[]")
QUIET = (
    "model.noisy=False",
    "model.norm=False",
    "datasets.toy_data.type=plain",
    "model.dropout=0.0",
    "run.weight_decay=0",
)


def options(stage, bf16=False):
    """The shared settings; torch's batch norm does not take bf16 parameters on a CPU."""
    return (
        "run.runner=runner_deepspeed",
        "run.checkpoint_format=shards",
        f"run.deepspeed_config.zero_optimization.stage={stage}",
        *(("model.noisy=False",) if stage == 3 else ()),
        *(("run.amp=True", "run.amp_dtype=bf16", "model.norm=False") if bf16 else ()),
    )


@pytest.fixture
def save_both(toy):
    """A training that writes each checkpoint in shards and, as twin_<steps>.pth, whole."""

    def main(arguments):
        from lavis_svp.runners.runner_deepspeed import RunnerDeepSpeed

        save = RunnerDeepSpeed._save_checkpoint

        def both(self, steps, is_best=False):
            save(self, steps, is_best)
            state = self.training_state()
            if torch.distributed.get_rank() == 0:
                contents = {**state, "config": self.config.to_dict(), "iters": steps}
                save_checkpoint(self.output_dir / f"twin_{steps}.pth", contents)

        RunnerDeepSpeed._save_checkpoint = both
        toy.main(arguments)

    return main


@pytest.mark.parametrize("processes", [pytest.param(1, marks=slow), 2])
@pytest.mark.parametrize(
    ("stage", "bf16"),
    [
        (1, True),
        (3, True),
        *(pytest.param(s, b, marks=slow) for s in range(4) for b in (0, 1) if (s, b) not in {(1, 1), (3, 1)}),
    ],
)
def test_shards_hold_what_the_whole_checkpoint_holds(
    tmp_path, run_toy, save_both, same_training, stage, bf16, processes
):
    run_toy(tmp_path, *options(stage, bf16), *SHORT, processes=processes, main=save_both)
    out = tmp_path / "out"
    folder = out / "checkpoint_2.shards"
    joined, whole = read_checkpoint(folder), read_checkpoint(out / "twin_2.pth")
    same_training(joined, whole)
    assert list(joined["model"]) == list(whole["model"]) and joined["config"] == whole["config"]
    facts = json.loads((folder / "complete.json").read_text())
    assert (facts["steps"], facts["world_size"], facts["zero_stage"]) == (2, processes, stage)
    assert not (out / "checkpoint_2.pth").exists() and newest_checkpoint(out) == folder
    foreign = read_zero_folder(folder)  # as of somebody else: by DeepSpeed's own files alone
    assert all(torch.equal(foreign.weights[name], whole["model"][name]) for name in foreign.weights)
    assert len(foreign.moments) == len(foreign.weights) == len(whole["optimizer"]["state"])


@slow
@pytest.mark.parametrize(("first", "second", "processes"), [(3, 2, 2), (2, 3, 1), (1, 0, 1)])
def test_shards_go_on_under_another_stage_and_world_size(tmp_path, run_toy, final_state, first, second, processes):
    run_toy(tmp_path / "whole", *QUIET, *LONG, processes=2)
    run_toy(tmp_path / "cut", *options(first), *QUIET, *LONG, kill="micro:13", processes=2)
    assert newest_checkpoint(tmp_path / "cut/out").name == "checkpoint_4.shards"
    batch = () if processes == 2 else ("run.accum_grad_iters=6",)  # the same samples in each step
    last = (*options(second), "run.checkpoint_format=whole", *QUIET, *LONG, *batch)
    run_toy(tmp_path / "cut", *last, processes=processes)
    ours, theirs = final_state(tmp_path / "cut", 6)["model"], final_state(tmp_path / "whole", 6)["model"]
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 2e-5
    assert "Resume at step 4" in (tmp_path / "cut/log").read_text()


@slow
@pytest.mark.parametrize("kill", ["save:2@0", "save:3@1", "save:6@0"])
def test_a_half_written_folder_is_never_taken(tmp_path, run_toy, same_training, kill):
    arguments = (*options(2), *LONG, "run.keep_checkpoints=1")
    run_toy(tmp_path / "whole", *arguments, processes=2)
    assert run_toy(tmp_path / "cut", *arguments, kill=kill, processes=2) != [0, 0]
    out = tmp_path / "cut/out"
    assert list(out.glob(".saving-*.shards"))
    run_toy(tmp_path / "cut", *arguments, processes=2)
    assert [path.name for path in out.iterdir() if path.name.endswith(".shards")] == ["checkpoint_6.shards"]
    same_training(
        read_checkpoint(out / "checkpoint_6.shards"), read_checkpoint(tmp_path / "whole/out/checkpoint_6.shards")
    )


def test_another_runner_does_not_take_the_format(tmp_path, run_toy):
    run_toy(tmp_path, "run.checkpoint_format=shards", check=False)
    assert "only run.runner 'runner_deepspeed' writes" in (tmp_path / "log").read_text()
