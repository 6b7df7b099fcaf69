"""The command shows every table and assumption and writes JSON; tests/benchmarks/ holds docs/plan.md to the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_svp.cli.plan import main
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.plan.estimate import Assumptions, make_plan, with_mlp
from lavis_svp.plan.flops import parameters_by_part
from lavis_svp.plan.report import assumption_lines, markdown
from lavis_svp.plan.settings import get_gpu, training_settings

ROOT = Path(__file__).resolve().parents[2]
RUN = {"task": "referring_segmentation", "output_dir": "output", "max_iters": 7}


@pytest.fixture(scope="module")
def small_plan(small_options):
    training = training_settings(RUN, {"refcoco_seg": {}})
    return make_plan(small_options(), training, get_gpu("rtx3090-24g"), 2, Assumptions(tokens=9, prompts=7))


def test_every_table_and_assumption_is_shown(small_plan):
    text = markdown(small_plan)
    for title in (
        "Parameters",
        "TFLOP for a training image",
        "TFLOP of answering",
        "GB on one of 2",
        "Saving",
        "Time",
        "Assumptions",
    ):
        assert f"**{title}" in text
    for line in assumption_lines(small_plan):
        assert line in text
    assert "9 superpixels" in text and "7 point prompts" in text and "DDP, fp32" in text
    assert "60-70 %" in text and "the paper's claim" in text


def test_superpixels_in_one_pass_have_no_prompts(small_options):
    options = small_options(superpixels={"name": "one_pass"})
    training = training_settings(RUN, {"refcoco_seg": {}})
    plan = make_plan(options, training, get_gpu("a100-40g"), 1, Assumptions(tokens=9))
    lines = list(assumption_lines(plan))
    assert plan.prompts == 0 and not any("prompts" in line for line in lines)
    assert any("boundary head" in line and "run on the CPU" in line for line in lines)
    assert "boundary_head" in markdown(plan)


def test_json_holds_every_number(small_plan):
    values = json.loads(json.dumps(small_plan.as_json()))
    assert values["tokens"] == 9 and values["baseline_tokens"] == 36
    assert values["memory"]["peak"] == pytest.approx(small_plan.memory.peak)
    assert values["duration"]["steps"] == 7 and values["savings"][0]["saved"] == pytest.approx(0.75)
    assert values["parameters"]["whole model"]["total"] > values["parameters"]["projector"]["total"]


def test_the_command_reads_a_project_and_writes_json(tmp_path, capsys):
    target = tmp_path / "plan.json"
    project = str(ROOT / "projects/svp/train/refshapes_tiny.yaml")
    words = ["--cfg-path", project, "--options", "run.max_iters=40", "--gpu", "rtx4090-24g", "--num-gpus", "1"]
    main([*words, "--json", str(target), "--tokens", "12"])
    shown = capsys.readouterr().out
    assert "refshapes_seg 1,200" in shown and "12 superpixels" in shown
    values = json.loads(target.read_text())
    assert values["duration"]["batch"] == 4 and values["duration"]["epochs"] == pytest.approx(40 * 4 / 1200)
    assert values["costs"]["SAM encoder"]["training"] == 0  # cache_features


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model-type", "big"], "glamm_vicuna7b"),
        (["--model-type", "tiny", "--gpu", "a100"], "a100-80g"),
        (["--model-type", "tiny", "--num-gpus", "0"], "at least one GPU"),
        (["--model-type", "tiny", "--utilisation", "40"], "share of the peak"),
        (["--cfg-path", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_input_is_told_in_a_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_patterns_of_the_projectors_insides_do_not_reach_mlp(small_options):
    options = small_options(trainable=["projector.*", "!projector.sspe*", "readout.*"])
    counts = parameters_by_part(SvpRis.skeleton(with_mlp(options)))
    assert counts["projector"].trained == counts["projector"].total > 0
    assert counts["seg_prompt"].trained > 0 == counts["mask_decoder"].trained
    assert with_mlp(small_options()).trainable is None


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"many": 0}, {"prompts": -1}, {"utilisation": 1.5}])
def test_impossible_assumptions_are_told(wrong):
    with pytest.raises(ValueError, match="at least|share"):
        Assumptions(**wrong)
