from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results, superpixel_tables, runner_table = load("results"), load("superpixel_tables"), load("runner_table")


def test_the_readmes_table_is_made_from_the_files():
    assert (ROOT / "README.md").read_text() == results.readme_with(results.table())


def test_the_superpixel_tables_are_made_from_the_file():
    assert superpixel_tables.DOCUMENT.read_text() == superpixel_tables.document()


def test_the_runners_table_is_made_from_the_file_and_below_the_bar():
    assert runner_table.DOCUMENT.read_text() == runner_table.document()
    assert all(row["overhead_ms"] < 5 for row in json.loads(runner_table.RESULTS.read_text())["rows"])


def test_stored_results_name_no_path_of_a_machine():
    for path in results.RESULTS.glob("*.json"):
        command = json.loads(path.read_text())["run"]["command"]
        assert " /" not in command and "=/" not in command, f"{path.name}: {command}"


def test_names_tell_label_and_seed(tmp_path):
    with pytest.raises(ValueError, match="_seed"):
        results.add("svp", tmp_path / "none.json")
