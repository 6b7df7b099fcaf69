"""What the pages publish is what was measured: tables are made from files, and the README's numbers are stored."""

from __future__ import annotations

import json
import re

import pytest
import results
import scores
import tables
from results import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACED = tables.placed()
SLOW = {"plan_overview"}


@pytest.mark.parametrize(
    ("page", "name", "body"),
    [pytest.param(*one, marks=[pytest.mark.slow] if one[1] in SLOW else [], id=one[1]) for one in PLACED],
)
def test_a_pages_table_is_made_from_its_file(page, name, body):
    assert tables.BLOCKS[name]() == body, f"{page.name}: run python benchmarks/tables.py"


def test_every_table_has_its_place():
    assert {name for _, name, _ in PLACED} == set(tables.BLOCKS)
    assert {name for page, name, _ in PLACED if page.name == "README.md"} == {"photo_short"}


def test_the_readmes_table_has_what_stands_beside_the_first_row():
    rows = [
        line.split(" | ")[0].strip("| *")
        for line in tables.BLOCKS["photo_short"]().splitlines()
        if line.startswith("| ")
    ]
    beside = ["the image classifier alone", "a region at random", "best single superpixel"]
    assert rows == ["data", "refphotos", *beside, "photos", "refshapes_fresh"]


def test_scores_in_the_readmes_prose_are_stored():
    """Three decimals, such as .719 or 0.719: a gIoU of the comparison, or a score of the shipped weights."""
    names = [f"{kind}_{data}" for kind, (_, tests) in scores.FILES.items() for data in tests]
    known = {results.load(name)["headline"]["giou_macro"] for name in names}
    for variant in tables.comparison.VARIANTS:
        for runs in tables.comparison.stored(variant).values():
            known.add(sum(run["headline"]["giou_macro"] for run in runs) / len(runs))
    prose = re.sub(r"<!-- photo_short:begin -->.*<!-- photo_short:end -->", "", README, flags=re.DOTALL)
    written = set(re.findall(r"(?<![\d.])0?(\.\d{3})(?!\d)", prose))
    assert written <= {f"{score:.3f}"[1:] for score in known}


def test_the_readmes_sentence_on_superpixels_is_that_of_the_default_preset():
    claim = tables.speed_claim()
    speed, ways = claim["times as fast as segment_anything"], [claim[key] for key in claim if "agreement" in key]
    sentences = [text for text in README.split("\n\n") if f"{speed} times" in text]
    assert len(sentences) == 1 and all(way in sentences[0] for way in ways), f"{claim}; {sentences}"
    assert not re.search(r"(?<![\d.])\.9\d(?!\d)", sentences[0]), "another preset's agreement"


@pytest.mark.parametrize(
    ("kind", "data"), [(kind, data) for kind, (_, tests) in scores.FILES.items() for data in tests]
)
def test_the_shipped_scores_are_those_of_the_file_in_the_package(kind, data):
    run, (weights, tests) = results.load(f"{kind}_{data}")["run"], scores.FILES[kind]
    held = {"name": weights, "sha256": scores.read_record(weights)["sha256"]}
    assert run["shipped_weights"] == held and run["model"]["finetuned"] == weights
    assert tests[data] in run["command"]


@pytest.mark.parametrize(
    ("name", "data"), [(name, data) for name, (_, tests) in scores.FILES.items() for data in tests]
)
def test_scores_of_other_weights_are_not_taken_for_the_shipped_ones(tmp_path, monkeypatch, name, data):
    weights = scores.FILES[name][0]
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    summary = tmp_path / "summary.json"
    for used in (None, {"name": weights, "sha256": "older"}):
        summary.write_text(json.dumps({"run": {"shipped_weights": used, "command": "lavis-svp evaluate"}}))
        with pytest.raises(ValueError, match="Score the file as shipped"):
            scores.add(f"{name}_{data}", summary)
    held = {"name": weights, "sha256": scores.read_record(weights)["sha256"]}
    command = "lavis-svp evaluate --checkpoint /home/someone/output/svp"
    summary.write_text(json.dumps({"run": {"shipped_weights": held, "command": command}}))
    kept = json.loads(scores.add(f"{name}_{data}", summary).read_text())
    assert kept["run"]["command"] == "lavis-svp evaluate --checkpoint output/svp"


def test_the_runners_cost_is_below_the_bar():
    assert all(row["overhead_ms"] < 5 for row in results.load("runner")["rows"])


def test_stored_results_name_no_folder_of_a_machine():
    for path in results.RESULTS.rglob("*.json"):
        assert not re.search(r"[ =']/\w+/", path.read_text()), path
