"""The headline's averaging, the groups, both modes, and that a summary is JSON."""

import json

import pytest

from lavis_svp.metrics.report import format_summary, summary


@pytest.fixture
def records(make_record):
    """Three attribute expressions (IoU 1, 1, .4), one relation (IoU .2), two without a target (right, wrong)."""
    return [
        make_record("a0", 10, 10, 10, image_id=0),
        make_record("a1", 10, 10, 10, image_id=1),
        make_record("a2", 4, 4, 10, image_id=2),
        make_record("r0", 2, 2, 10, image_id=0, kind="relation", baseline_random=0.3),
        make_record("n0", image_id=1, kind="no_target"),
        make_record("n1", 0, 7, image_id=2, kind="no_target"),
    ]


def test_each_kind_with_a_target_weighs_the_same(records):
    head = summary(records)["headline"]
    assert head["kinds"] == ["attribute", "relation"]
    assert head["giou_macro"] == pytest.approx((0.8 + 0.2) / 2)
    assert head["giou_micro"] == pytest.approx((1 + 1 + 0.4 + 0.2) / 4)
    assert head["ciou_macro"] == pytest.approx((24 / 30 + 2 / 10) / 2)
    assert head["ciou_micro"] == pytest.approx(26 / 40)
    assert head["baseline_random_macro"] == pytest.approx(0.3)
    assert head["n"] == 4


def test_no_target_is_apart_and_in_overall(records):
    result = summary(records)
    assert result["no_target"]["n_acc"] == 0.5
    assert set(result["by_kind"]) == {"attribute", "relation"}
    assert result["overall"]["giou"] == pytest.approx((1 + 1 + 0.4 + 0.2 + 1 + 0) / 6)
    assert result["with_target"]["n"] == 4
    free = [record for record in records if record["expression_id"] != "n1"]
    assert summary(free)["headline"] == result["headline"]  # no answer to "no target" can move the headline


def test_headline_interval_holds_the_headline(records):
    head = summary(records)["headline"]
    low, high = head["giou_macro_ci"]
    assert low <= head["giou_macro"] <= high


def test_splits_are_summed_up_apart(records):
    other = [{**record, "split": "photos", "expression_id": "p" + record["expression_id"]} for record in records[:1]]
    by_split = summary(records + other)["by_split"]
    assert {name: split["overall"]["n"] for name, split in by_split.items()} == {"photos": 1, "test": 6}
    assert by_split["photos"]["headline"]["giou_macro"] == 1.0


def test_both_modes_stand_side_by_side(records):
    forced = {"answered": True, "intersection": 10, "union": 10, "pred_area": 10}
    both = [{**record, "teacher_forced": forced} for record in records if record["has_target"]]
    result = summary(both)
    assert result["mode"] == "generative"
    assert result["headline"]["giou_macro"] == pytest.approx(0.5)
    assert result["teacher_forced"]["headline"]["giou_macro"] == 1.0
    assert format_summary(result).count("mean of kinds") == 2


def test_summary_is_strict_json(records):
    result = summary(records)
    assert json.loads(json.dumps(result, allow_nan=False))["headline"]["n"] == 4


def test_only_no_target_expressions(records):
    result = summary(records[4:])
    assert result["headline"]["giou_macro"] is None
    assert result["by_kind"] == {}
    assert "no_target" in format_summary(result)


def test_mixed_modes_and_nothing_are_refused(records):
    with pytest.raises(ValueError, match="nothing was evaluated"):
        summary([])
    with pytest.raises(ValueError, match="generative.*teacher_forced"):
        summary([records[0], {**records[1], "mode": "teacher_forced"}])


def test_table_shows_each_kind_with_its_baselines(records):
    text = format_summary(summary(records), "test")
    assert text.startswith("test: generative answers")
    relation = next(line for line in text.splitlines() if line.startswith("relation"))
    assert "0.200" in relation and "0.300" in relation
    assert any(line.startswith("mean of kinds") and "0.500" in line for line in text.splitlines())
    assert "10.0 visual tokens per image" in text


def test_tags_are_groups_of_expressions_with_a_target(records):
    tags = [{"clutter": "few", "size": "small"}, {"clutter": "scene"}, {"clutter": "few"}, {}, {"clutter": "scene"}]
    tagged = [{**record, "tags": one} for record, one in zip(records, tags, strict=False)] + records[5:]
    result = summary(tagged)
    counts = {tag: {value: group["n"] for value, group in by.items()} for tag, by in result["by_tag"].items()}
    assert counts == {"clutter": {"few": 2, "scene": 1}, "size": {"small": 1}}
    assert result["by_tag"]["clutter"]["few"]["giou"] == pytest.approx((1 + 0.4) / 2)
    assert {key: value for key, value in result.items() if key != "by_tag"} == summary(records)
    (row,) = (line for line in format_summary(result).splitlines() if line.startswith("clutter: few"))
    assert row.split()[2:4] == ["2", "0.700"]


def test_without_tags_there_is_no_group_of_them(records):
    assert "by_tag" not in summary(records) and "by_tag" not in summary([{**one, "tags": {}} for one in records])


def test_half_of_a_picked_region_must_lie_in_the_target(make_record):
    shares = (0.5, 0.49, 1.0, None)
    records = [make_record(str(n), 1, 1, 10, pick_inside=share) for n, share in enumerate(shares)]
    result = summary(records)
    assert result["with_target"]["pick_inside"] == pytest.approx(2 / 3) == result["headline"]["pick_inside_macro"]
    assert summary([make_record("old", 1, 1, 10)])["with_target"]["pick_inside"] is None
