"""The comparison's statistics and tables, and what equal time means."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


comparison, learning = load("comparison"), load("learning")
EXPRESSIONS = [[f"e{i}", i // 3, comparison.KINDS[i % 3]] for i in range(90)]  # 30 pictures, one of each kind


def test_the_documents_tables_are_made_from_the_files():
    assert comparison.DOCUMENT.read_text() == comparison.document()
    assert learning.DOCUMENT.read_text() == learning.document()


def test_stored_commands_name_no_machines_folder():
    for path in comparison.RESULTS.parent.rglob("*.json"):
        assert not re.search(r"[ =']/\w+/", path.read_text()), path


def test_a_row_that_is_better_everywhere_leads_by_that_much():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.8, (3, 90))
    one, other = comparison.Scores(list(low + 0.1), EXPRESSIONS), comparison.Scores(list(low), EXPRESSIONS)
    point, least, most = comparison.difference(one, other)
    assert point == pytest.approx(0.1)
    assert least < 0.1 < most and most - least < 0.2
    assert comparison.difference(one, one)[0] == 0


def test_the_headline_averages_kinds_whatever_their_numbers():
    expressions = [["a", 0, "attribute"], ["b", 0, "attribute"], ["c", 1, "relation"], ["d", 1, "superlative"]]
    scores = comparison.Scores([[1.0, 1.0, 0.5, 0.0]], expressions)
    assert scores.giou(np.array([0]), np.arange(2)) == pytest.approx(0.5)
    assert scores.giou(np.array([0, 0]), np.array([0, 1, 1])) == pytest.approx(0.5)


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.8, 90)
    zero = comparison.Scores([list(np.zeros(90))], EXPRESSIONS)
    alike = comparison.Scores([list(base)] * 3, EXPRESSIONS)
    apart = comparison.Scores([list(base + shift) for shift in (-0.2, 0.0, 0.2)], EXPRESSIONS)
    widths = [high - low for _, low, high in (comparison.difference(s, zero) for s in (alike, apart))]
    assert widths[1] > 1.5 * widths[0]


def run_folder(tmp_path, name, shift=0.0, command="python"):
    folder = tmp_path / name
    (folder / "result").mkdir(parents=True)
    kind = dict.fromkeys(("giou", "ceiling_single", "baseline_attribute", "baseline_random"), 0.5) | {
        "seg_miss_rate": 0.2
    }
    headline = {f"{key}_macro": 0.5 for key in (*kind, "pick_accuracy", "ciou")}
    machine = {"threads": 1, "cpus": 2}
    summary = {
        "headline": headline,
        "by_kind": dict.fromkeys(comparison.KINDS, kind),
        "overall": {"n_acc": None, "tokens_per_picture": 20.0},
        "run": {"date": "2026-01-01T00:00:00", "command": command, "machine": machine},
    }
    (folder / "result/test.summary.json").write_text(json.dumps(summary))
    records = [
        {
            "expression_id": e,
            "image_id": p,
            "kind": k,
            "has_target": True,
            "intersection": 50 + 10 * shift,
            "union": 100,
        }
        for e, p, k in EXPRESSIONS
    ]
    (folder / "result/test.jsonl").write_text(
        "\n".join(map(json.dumps, [*records, records[0] | {"has_target": False}]))
    )
    (folder / "log.txt").write_text(json.dumps({"train_iters": 700}) + "\n")
    return folder


def test_runs_are_taken_over_and_make_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "RESULTS", tmp_path / "results")
    for seed in (1, 2):
        comparison.add(run_folder(tmp_path, f"svp_steps_seed{seed}", shift=1))
        comparison.add(run_folder(tmp_path, f"mlp_steps_seed{seed}"))
    table = comparison.score_table("steps", comparison.stored()).splitlines()
    assert next(line for line in table if "`mlp`" in line).count("+0.100 (+0.100 to +0.100)") == 1
    assert any("`perceiver` | not run" in line for line in table)
    assert 'compare.sh mlp --seeds "1 2" --budget steps' in comparison.commands(comparison.stored())
    command = "python --options model.aids.place_alignment=0"
    with pytest.raises(ValueError, match="another variant"):
        comparison.add(run_folder(tmp_path, "svp_steps_seed3", command=command))
    with pytest.raises(ValueError, match="another variant"):
        comparison.add(run_folder(tmp_path / "no_places", "svp_steps_seed4"))
    comparison.add(run_folder(tmp_path / "no_places", "svp_steps_seed3", command=command))
    assert [run["seed"] for run in comparison.stored()["svp", "time"]] == [1, 2]
    assert [run["seed"] for run in comparison.stored("no_places")["svp", "time"]] == [3]
    assert comparison.commands(comparison.stored("no_places"), "no_places").count("model.aids.place_alignment=0") == 1
    with pytest.raises(ValueError, match="named ROW_BUDGET_seedN"):
        comparison.add(tmp_path / "mlp")
    (tmp_path / "svp_time_seed1").mkdir()
    with pytest.raises(FileNotFoundError, match="has the run been scored"):
        comparison.add(tmp_path / "svp_time_seed1")


def test_giou_where_answered_leaves_out_what_was_refused():
    by_kind = {
        kind: {"giou": 0.6, "seg_miss_rate": miss}
        for kind, miss in zip(comparison.KINDS, (0.25, 0.0, 0.0), strict=True)
    }
    assert comparison.giou_where_answered(by_kind) == pytest.approx((0.8 + 0.6 + 0.6) / 3)
    by_kind["attribute"] = {"giou": 0.0, "seg_miss_rate": 1.0}
    assert comparison.giou_where_answered(by_kind) is None


def test_equal_time_counts_alignment_steps_at_their_own_price():
    step_times = load("step_times")

    def row(alignment_steps, alignment, full):
        return {"alignment_steps": alignment_steps, "seconds": {"alignment": alignment, "full: step": full}}

    rows = {"svp": row(300, 0.5, 2.0), "mlp": row(300, 1.0, 5.0), "svp_paper": row(0, 9.9, 1.0)}
    content = {"rows": rows}  # svp: 150 s of alignment, 800 s of full steps
    assert step_times.equal_time_steps(content, "svp", 700) == 700
    assert step_times.equal_time_steps(content, "mlp", 700) == 300 + 130
    assert step_times.equal_time_steps(content, "svp_paper", 700) == 950
    with pytest.raises(ValueError, match="no row 'none'"):
        step_times.equal_time_steps(content, "none", 700)
