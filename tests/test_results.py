from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results, superpixel_tables, loader_table = load("results"), load("superpixel_tables"), load("loader_table")
runner_table, answering_table = load("runner_table"), load("answering_table")
shipped_table = load("shipped_table")


def test_the_first_recipes_table_is_made_from_the_files():
    assert results.DOCUMENT.read_text() == results.document()


def test_the_superpixel_tables_are_made_from_the_file():
    assert superpixel_tables.DOCUMENT.read_text() == superpixel_tables.document()


def test_the_loaders_table_is_made_from_the_file():
    assert loader_table.DOCUMENT.read_text() == loader_table.document()


def test_the_runners_table_is_made_from_the_file_and_below_the_bar():
    assert runner_table.DOCUMENT.read_text() == runner_table.document()
    assert all(row["overhead_ms"] < 5 for row in json.loads(runner_table.RESULTS.read_text())["rows"])


def test_the_answers_tables_are_made_from_the_files():
    assert answering_table.DOCUMENT.read_text() == answering_table.document()


def test_the_shipped_weights_table_is_made_from_the_files():
    for path, text in shipped_table.documents().items():
        assert path.read_text() == text


@pytest.mark.parametrize("data", shipped_table.YAMLS)
def test_the_shipped_weights_scores_are_those_of_the_file_in_the_package(data):
    run = json.loads(shipped_table.path(data).read_text())["run"]
    assert run["shipped_weights"] == {
        "name": "svp_ris_tiny",
        "sha256": shipped_table.read_record("svp_ris_tiny")["sha256"],
    }
    assert run["model"]["finetuned"] == "svp_ris_tiny"


@pytest.fixture
def shipped_results(tmp_path, monkeypatch):
    """An empty folder of results, and a package that holds a file with the sha256 "abc"."""
    monkeypatch.setattr(shipped_table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(shipped_table, "read_record", lambda name: {"sha256": "abc"})
    (tmp_path / "results").mkdir()
    summary = json.loads((results.RESULTS / "refshapes__sam_seed42.json").read_text())
    summary["run"]["shipped_weights"] = {"name": "svp_ris_tiny", "sha256": "abc"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_shipped_table_before_and_after_a_result(shipped_results):
    assert "Not measured yet" in shipped_table.table()
    shipped_table.add("refshapes", shipped_results / "summary.json")
    lines = shipped_table.table().splitlines()
    assert lines[2].startswith("| refshapes | **0.708** | 0.679–0.737 | 0.782 (")
    assert any(line.startswith("| *attribute reader that guesses* | 0.593 |  | 1.000 | 0.421 |") for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "sha256 `abc`" in lines[-1] and "1200 expressions on 150 images" in lines[-1]


@pytest.mark.parametrize("used", [None, {"name": "svp_ris_tiny", "sha256": "older"}])
def test_scores_of_other_weights_are_not_taken_for_the_shipped_ones(shipped_results, used):
    path = shipped_results / "summary.json"
    path.write_text(json.dumps({"run": {"shipped_weights": used}}))
    with pytest.raises(ValueError, match="Score the file as shipped: python -m lavis_svp.evaluate"):
        shipped_table.add("refshapes", path)
    with pytest.raises(ValueError, match="one of refshapes, refshapes_fresh, photos; got"):
        shipped_table.add("coco", path)


@pytest.mark.slow
def test_the_runner_benchmark_ends_with_a_json_line_and_stores_nothing_when_quick():
    before = runner_table.RESULTS.read_text()
    command = [sys.executable, str(ROOT / "benchmarks/runner.py"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["overhead_ms"] == pytest.approx(line["ms_per_step"] - line["bare_ms"], abs=1e-3)
    assert line["bare_ms"] > 0 and line["overhead_ms"] < line["bar_ms"]
    assert runner_table.RESULTS.read_text() == before


def test_stored_results_name_no_path_of_a_machine():
    for path in results.RESULTS.glob("**/*.json"):
        content = json.loads(path.read_text())
        stored = [content["run"]] if isinstance(content, dict) else [one for one in content if isinstance(one, dict)]
        for command in (run["command"] for run in stored):
            assert path.parent.name == "comparison" or (" /" not in command and "=/" not in command), path.name


def test_names_tell_label_and_seed(tmp_path):
    with pytest.raises(ValueError, match="_seed"):
        results.add("svp", tmp_path / "none.json")
