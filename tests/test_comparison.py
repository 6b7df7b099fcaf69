"""The comparison's statistics and tables, and what equal time means."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


leads, runs, step_tables, comparison, learning = map(
    load, ("leads", "comparison_runs", "step_tables", "comparison", "learning")
)
EXPRESSIONS = [[f"e{i}", i // 3, comparison.KINDS[i % 3], 100 + i] for i in range(90)]  # 30 images, one of each kind


def test_the_documents_tables_are_made_from_the_files():
    assert comparison.DOCUMENT.read_text() == comparison.document()
    assert learning.DOCUMENT.read_text() == learning.document()


@pytest.mark.parametrize(
    ("row", "budget", "variant"),
    [(row, "time", "") for row in ("svp", "mlp", "mask_pool", "avg_pool", "token_packer")]
    + [(row, "steps", "") for row in ("mlp", "mask_pool", "token_packer", "dpc_knn", "perceiver")]
    + [(row, "time", "crowded") for row in ("svp", "mask_pool", "avg_pool")]
    + [(row, "steps", "crowded") for row in ("mask_pool", "token_packer")],
)
def test_the_readme_gives_the_stored_scores(row, budget, variant):
    """In an item on the paper's claim that names the row, in the form .719, behind its name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    claim = text[text.index("**Does the paper's claim hold") : text.index("Time of the default command")]
    mean = np.mean([run["headline"]["giou_macro"] for run in comparison.stored(variant)[row, budget]])
    score = re.escape(f"{mean:.3f}"[1:])
    assert any(re.search(rf"`{row}`.*?{score}", item, re.DOTALL) for item in claim.split("\n- ")), (
        f"{row} at equal {budget} {variant}: {mean:.3f}"
    )


def test_stored_commands_name_no_machines_folder():
    for path in comparison.RESULTS.parent.rglob("*.json"):
        assert not re.search(r"[ =']/\w+/", path.read_text()), path


def test_a_row_that_is_better_everywhere_leads_by_that_much():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.8, (3, 90))
    one, other = leads.Scores(list(low + 0.1), EXPRESSIONS), leads.Scores(list(low), EXPRESSIONS)
    lead = leads.difference(one, other)
    assert lead.point == pytest.approx(0.1) and lead.seeds
    assert lead.low < 0.1 < lead.high and lead.high - lead.low < 0.3
    assert leads.difference(one, one).point == 0


def test_the_headline_averages_kinds_whatever_their_numbers():
    expressions = [
        ["a", 0, "attribute", 9],
        ["b", 0, "attribute", 9],
        ["c", 1, "relation", 9],
        ["d", 1, "superlative", 9],
    ]
    scores = leads.Scores([[1.0, 1.0, 0.5, 0.0]], expressions)
    assert scores.by_seed() == pytest.approx([0.5])
    assert scores.draws(np.array([[0, 1], [0, 1]])) == pytest.approx([0.5, 0.5])


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Rows that differ by luck alone: the seed's, the image's and the expression's."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(150):
        truth = rng.normal(0.6, 0.1, 30)[[image for _, image, *_ in EXPRESSIONS]]
        rows = [truth + rng.normal(0, 0.03, (3, 1)) + rng.normal(0, 0.1, (3, 90)) for _ in range(2)]
        lead = leads.difference(*(leads.Scores(list(row), EXPRESSIONS) for row in rows))
        held.append(lead.low < 0 < lead.high)
    assert np.mean(held) >= 0.92


def test_one_seed_gives_an_interval_over_images_and_says_so():
    rng = np.random.default_rng(0)
    one, many = (leads.Scores(list(rng.uniform(0, 1, (count, 90))), EXPRESSIONS) for count in (1, 3))
    assert "over images" in str(leads.difference(one, many))
    assert "over images" not in str(leads.difference(many, many))


def run_folder(tmp_path, name, shift=0.0, options=""):
    folder = tmp_path / name
    row, seed = name.split("_steps_seed")
    command = (
        f"python -m lavis_svp.train --cfg-path projects/svp/comparison/{row}.yaml --options run.seed={seed} {options}"
    )
    (folder / "result").mkdir(parents=True)
    kind = dict.fromkeys(("giou", "ceiling_single", "baseline_attribute", "baseline_random"), 0.5) | {
        "seg_miss_rate": 0.2
    }
    headline = {f"{key}_macro": 0.5 for key in (*kind, "pick_accuracy", "ciou")}
    machine = {"threads": 1, "cpus": 2}
    summary = {
        "headline": headline,
        "by_kind": dict.fromkeys(comparison.KINDS, kind),
        "overall": {"n_acc": None, "tokens_per_image": 20.0},
        "run": {"date": "2026-01-01T00:00:00", "command": command, "machine": machine},
    }
    (folder / "result/test.summary.json").write_text(json.dumps(summary))
    records = [
        {
            "expression_id": e,
            "image_id": p,
            "kind": k,
            "gt_area": area,
            "has_target": True,
            "intersection": 50 + 10 * shift,
            "union": 100,
        }
        for e, p, k, area in EXPRESSIONS
    ]
    (folder / "result/test.jsonl").write_text(
        "\n".join(map(json.dumps, [*records, records[0] | {"has_target": False}]))
    )
    (folder / "log.txt").write_text(json.dumps({"train_iters": 700}) + "\n")
    return folder


def test_runs_are_taken_over_and_make_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    for seed in (1, 2):
        comparison.add(run_folder(tmp_path, f"svp_steps_seed{seed}", shift=1))
        comparison.add(run_folder(tmp_path, f"mlp_steps_seed{seed}"))
    table = comparison.score_table("steps", comparison.stored()).splitlines()
    assert next(line for line in table if "`mlp`" in line).count("+0.100 (+0.100 to +0.100) ") == 1
    assert any("`perceiver` | not run" in line for line in table)
    sizes = comparison.size_table(comparison.stored()).splitlines()
    assert sizes[0].startswith("| row | budget | seeds | 100 to 122 pixels |") and sizes[3].endswith("| 0.500 |")
    assert 'compare.sh mlp --seeds "1 2" --budget steps' in comparison.commands(comparison.stored())
    places = "model.aids.place_alignment=0"
    wrong = [("", places), ("", "model.layout=conversation"), ("", "run.max_iters=9"), ("no_places", "")]
    for number, (variant, options) in enumerate(wrong):
        with pytest.raises(ValueError, match="is not row 'svp' at equal steps"):
            comparison.add(run_folder(tmp_path / variant, f"svp_steps_seed{number + 4}", options=options))
    comparison.add(run_folder(tmp_path / "no_places", "svp_steps_seed3", options=places))
    assert [run["seed"] for run in comparison.stored()["svp", "time"]] == [1, 2]
    assert [run["seed"] for run in comparison.stored("no_places")["svp", "time"]] == [3]
    assert comparison.commands(comparison.stored("no_places"), "no_places").count("model.aids.place_alignment=0") == 1
    with pytest.raises(ValueError, match="named ROW_BUDGET_seedN"):
        comparison.add(tmp_path / "mlp")
    with pytest.raises(ValueError, match="with a row of svp, "):
        comparison.add(tmp_path / "svp_raster_steps_seed1")
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
