"""The whole model, at a tiny size, under DeepSpeed: two gloo processes that train, validate, save, die and go on."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("deepspeed")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("svp")


def stage(number, bf16=False):
    """ZeRO-3 in fp32 shards all weights of the language model, however small; in bf16 it keeps small ones whole."""
    zero = f"run.deepspeed_config.zero_optimization.stage={number}"
    threshold = (
        ("run.deepspeed_config.zero_optimization.stage3_param_persistence_threshold=0",)
        if number == 3 and not bf16
        else ()
    )
    return (zero, *threshold, *(("run.amp=True", "run.amp_dtype=bf16") if bf16 else ()))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "out/log.txt").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


@pytest.mark.parametrize(
    ("number", "bf16", "kill"),
    [
        (2, True, "save:2@0"),
        (3, False, "micro:4@1"),
        *(pytest.param(1, b, "micro:6@1", marks=slow) for b in (False, True)),
        pytest.param(2, False, "evaluation:1@1", marks=slow),
        pytest.param(2, True, "micro:4@0", marks=slow),
        pytest.param(3, True, "save:3@0", marks=slow),
        pytest.param(3, True, "evaluation:1@0", marks=slow),
    ],
)
def test_killed_in_one_process_it_ends_with_the_weights_of_an_undisturbed_run(
    tmp_path, shared, run_svp, same_training, number, bf16, kill
):
    """Kills: while a checkpoint is written, in an accumulation, in an evaluation."""
    whole = run_svp(shared / f"zero{number}{bf16}", *stage(number, bf16))
    run_svp(tmp_path, *stage(number, bf16), kill=kill)
    assert not (tmp_path / "out/checkpoint_4.pth").exists()
    same_training(run_svp(tmp_path, *stage(number, bf16)), whole)
    results = [
        json.loads((folder / "out/result/metrics_test_4.json").read_text())
        for folder in (tmp_path, shared / f"zero{number}{bf16}")
    ]
    assert results[0]["agg_metrics"] == results[1]["agg_metrics"]


@pytest.mark.slow
def test_every_stage_computes_what_ddp_computes(tmp_path, run_svp):
    """Losses of ZeRO in fp32 (dropout included) are DDP's, those in bf16 close to them.

    At a small rate: AdamW's first steps move every weight by the rate, so noise in a gradient's sign counts fully.
    """
    gently = "run.init_lr=1e-5"
    run_svp(tmp_path / "ddp", "run.runner=runner_svp", gently)
    for number, bf16, tolerance in ((3, False, 1e-4), (2, False, 1e-4), (2, True, 0.02), (3, True, 0.02)):
        folder = tmp_path / f"zero{number}{bf16}"
        run_svp(folder, *stage(number, bf16), gently)
        assert losses(folder) == pytest.approx(losses(tmp_path / "ddp"), rel=tolerance)
