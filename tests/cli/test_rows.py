"""``lavis-svp ablation`` and ``compare``: which runs they start, in which order, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_svp.cli import rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """started(command, *words) -> (row's YAML, words behind it) of each training that it starts, and its exit code."""
    monkeypatch.chdir(tmp_path)
    fails: set[str] = set()

    def run(command, *words):
        calls = []

        def child(words, title):
            calls.append((Path(words[5]).stem, " ".join(words[6:])))
            if Path(words[5]).stem in fails:
                raise SystemExit(3)

        monkeypatch.setattr(rows, "run_child", child)
        try:
            return calls, getattr(rows, command)(list(words))
        except SystemExit as end:
            if not calls:
                raise
            return calls, end.code

    run.fails = fails
    return run


def finish(output: str, **metrics: float) -> None:
    result = Path(output, "result")
    result.mkdir(parents=True)
    (result / "metrics_test_1500.json").write_text(json.dumps(metrics))


def test_rows_run_one_after_another_and_once(started, capsys) -> None:
    finish("output/svp/ablation/sspe_off", giou_macro=0.5, ciou_macro=0.25)
    names = sorted(path.stem for path in (ROOT / "projects/svp/ablation").glob("*.yaml"))
    assert [row for row, _ in started("ablation")[0]] == [row for row in names if row != "sspe_off"]
    table = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["sspe_off", "0.5000", "0.2500"] for line in table)
    calls, _ = started("ablation", "--nproc", "1", "sspe_off", "full", "--options", "run.max_iters=2")
    assert calls == [("full", "--nproc=1 --options run.output_dir=output/svp/ablation/full run.max_iters=2")]
    calls, _ = started("ablation", "sspe_off", "--seeds", "1 2", "--into", "short")
    assert calls == [
        ("sspe_off", f"--options run.output_dir=output/svp/ablation/short/sspe_off_seed{seed} run.seed={seed}")
        for seed in (1, 2)
    ]


def test_a_row_that_fails_ends_the_command(started) -> None:
    started.fails.add("full")
    calls, code = started("ablation", "full", "mask_pool")
    assert [row for row, _ in calls] == ["full"] and code == 3


def test_the_comparison_names_its_budget_and_reads_equal_time_from_the_measurement(started, monkeypatch) -> None:
    calls, _ = started("compare", "svp", "mlp", "--seeds", "1")
    assert [words for _, words in calls] == [
        f"--options run.output_dir=output/svp/comparison/{row}_steps_seed1 run.seed=1" for row in ("svp", "mlp")
    ]
    monkeypatch.setattr(rows, "_equal_time", lambda row: f"run.max_iters={len(row)}")
    calls, _ = started("compare", "mlp", "--budget", "time")
    assert calls == [("mlp", "--options run.output_dir=output/svp/comparison/mlp_time run.max_iters=3")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("spe_off", "no row 'spe_off'. Rows: .*sspe_off"),
        ("full --seeds one", "--seeds must be whole numbers"),
        ("full --options run.seed=3", "--seeds chooses the seeds"),
        ("full --into ../elsewhere", "letters, digits and _, got '../elsewhere'"),
        ("--cfg-path full.yaml", "unrecognized arguments: --cfg-path"),
        ("--folder nowhere", "no YAMLs in nowhere"),
    ],
)
def test_what_it_does_not_take(started, capsys, given: str, words: str) -> None:
    import re

    with pytest.raises(SystemExit) as end:
        started("ablation", *given.split())
    assert end.value.code == 2 and re.search(words, capsys.readouterr().err)


def test_a_torn_result_is_none(tmp_path, caplog) -> None:
    result = tmp_path / "result"
    result.mkdir()
    (result / "metrics_test_9.json").write_text('{"giou_macro": 0.')
    (result / "metrics_test_x.json").write_text("{}")
    assert rows.result_of(tmp_path) is None and "metrics_test_9.json" in caplog.text
