"""The comparison's statistics, how its runs are taken over, and what equal time means."""

from __future__ import annotations

import json

import comparison
import numpy as np
import pytest
import results
import step_times
from comparison import KINDS, Scores, difference

EXPRESSIONS = [[f"e{i}", i // 3, KINDS[i % 3], 100 + i] for i in range(90)]  # 30 images, one of each kind


def test_a_row_that_is_better_everywhere_leads_by_that_much():
    low = np.random.default_rng(0).uniform(0, 0.8, (3, 90))
    one, other = Scores(low + 0.1, EXPRESSIONS), Scores(low, EXPRESSIONS)
    lead = difference(one, other)
    assert lead.point == pytest.approx(0.1) and lead.seeds
    assert lead.low < 0.1 < lead.high and lead.high - lead.low < 0.3
    assert difference(one, one).point == 0


def test_the_headline_averages_kinds_whatever_their_numbers():
    kinds = [("a", 0, "attribute"), ("b", 0, "attribute"), ("c", 1, "relation"), ("d", 1, "superlative")]
    scores = Scores([[1.0, 1.0, 0.5, 0.0]], [[*one, 9] for one in kinds])
    assert scores.by_seed() == pytest.approx([0.5])
    assert scores.draws(np.array([[0, 1], [0, 1]])) == pytest.approx([0.5, 0.5])


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Rows that differ by luck alone: the seed's, the image's and the expression's."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(150):
        truth = rng.normal(0.6, 0.1, 30)[[image for _, image, *_ in EXPRESSIONS]]
        rows = [truth + rng.normal(0, 0.03, (3, 1)) + rng.normal(0, 0.1, (3, 90)) for _ in range(2)]
        lead = difference(*(Scores(row, EXPRESSIONS) for row in rows))
        held.append(lead.low < 0 < lead.high)
    assert np.mean(held) >= 0.92


def test_one_seed_gives_an_interval_over_images_and_says_so():
    rng = np.random.default_rng(0)
    one, many = (Scores(rng.uniform(0, 1, (count, 90)), EXPRESSIONS) for count in (1, 3))
    assert "over images" in str(difference(one, many))
    assert "over images" not in str(difference(many, many))


def run_folder(tmp_path, name, intersection=50, options=""):
    """A scored run, as the runner leaves it."""
    folder, (row, seed) = tmp_path / name, name.split("_steps_seed")
    keys = ("giou", "ceiling_single", "baseline_attribute", "baseline_random")
    yaml = f"projects/svp/comparison/{row}.yaml"
    summary = {
        "headline": {f"{key}_macro": 0.5 for key in (*keys, "pick_accuracy", "ciou")},
        "by_kind": dict.fromkeys(KINDS, dict.fromkeys(keys, 0.5) | {"seg_miss_rate": 0.2}),
        "overall": {"n_acc": None, "tokens_per_image": 20.0},
        "run": {
            "date": "2026-01-01T00:00:00",
            "command": f"lavis-svp train --cfg-path {yaml} --options run.seed={seed} {options}",
            "machine": {"threads": 1, "cpus": 2},
        },
    }
    (folder / "result").mkdir(parents=True)
    (folder / "result/test.summary.json").write_text(json.dumps(summary))
    names = ("expression_id", "image_id", "kind", "gt_area")
    hit = {"has_target": True, "intersection": intersection, "union": 100}
    records = [dict(zip(names, one, strict=True)) | hit for one in EXPRESSIONS]
    lines = map(json.dumps, [*records, records[0] | {"has_target": False}])
    (folder / "result/test.jsonl").write_text("\n".join(lines))
    (folder / "log.txt").write_text(json.dumps({"train_iters": 700}) + "\n")
    return folder


def test_runs_are_taken_over_and_make_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    for seed in (1, 2):
        comparison.add(run_folder(tmp_path, f"svp_steps_seed{seed}", intersection=60))
        comparison.add(run_folder(tmp_path, f"mlp_steps_seed{seed}"))
    lines = comparison.score_table("", "steps").splitlines()
    assert next(line for line in lines if "`mlp`" in line).count("+0.100 (+0.100 to +0.100) ") == 1
    assert any("`perceiver` | not run" in line for line in lines)
    sizes = comparison.size_table("").splitlines()
    assert sizes[0].startswith("| row | budget | seeds | 100 to 122 pixels |") and sizes[3].endswith("| 0.500 |")
    assert 'lavis-svp compare mlp --seeds "1 2" --budget steps' in comparison.commands()
    assert [run["seed"] for run in comparison.stored()["svp", "time"]] == [1, 2]


@pytest.mark.parametrize("key", ["model.auxiliary_losses", "model.aids"])
def test_variants_are_kept_apart_by_their_options(tmp_path, monkeypatch, key):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    places = f"{key}.place_alignment=0"
    comparison.add(run_folder(tmp_path / "no_places", "svp_steps_seed3", options=places))
    assert [run["seed"] for run in comparison.stored("no_places")["svp", "time"]] == [3]
    wrong = [("", places), ("", "model.layout=conversation"), ("", "run.max_iters=9"), ("no_places", "")]
    for number, (variant, options) in enumerate(wrong):
        with pytest.raises(ValueError, match="is not row 'svp' at equal steps"):
            comparison.add(run_folder(tmp_path / variant, f"svp_steps_seed{number + 4}", options=options))


@pytest.mark.parametrize("name", ["mlp", "svp_raster_steps_seed1"])
def test_only_runs_of_the_comparison_are_taken(tmp_path, name):
    with pytest.raises(ValueError, match="ROW_BUDGET_seedN"):
        comparison.add(tmp_path / name)
    (tmp_path / "svp_time_seed1").mkdir()
    with pytest.raises(FileNotFoundError, match="has the run been scored"):
        comparison.add(tmp_path / "svp_time_seed1")


def test_giou_where_answered_leaves_out_what_was_refused():
    by_kind = {kind: {"giou": 0.6, "seg_miss_rate": miss} for kind, miss in zip(KINDS, (0.25, 0.0, 0.0), strict=True)}
    assert comparison.giou_where_answered(by_kind) == pytest.approx((0.8 + 0.6 + 0.6) / 3)
    by_kind["attribute"] = {"giou": 0.0, "seg_miss_rate": 1.0}
    assert comparison.giou_where_answered(by_kind) is None


def test_equal_time_counts_alignment_steps_at_their_own_price():
    def row(alignment_steps, alignment, full):
        return {"alignment_steps": alignment_steps, "seconds": {"alignment": alignment, "full: step": full}}

    rows = {"svp": row(300, 0.5, 2.0), "mlp": row(300, 1.0, 5.0), "svp_paper": row(0, 9.9, 1.0)}
    content = {"rows": rows}  # svp: 150 s of alignment, 800 s of full steps
    assert step_times.equal_time_steps(content, "svp", 700) == 700
    assert step_times.equal_time_steps(content, "mlp", 700) == 300 + 130
    assert step_times.equal_time_steps(content, "svp_paper", 700) == 950
    with pytest.raises(ValueError, match="no row 'none'"):
        step_times.equal_time_steps(content, "none", 700)
