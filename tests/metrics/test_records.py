"""Every expression exactly once, whatever the sampler repeats."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.files import BadFileError
from lavis_svp.metrics.records import (
    check_records,
    merge_records,
    read_metrics,
    read_records,
    records_of_mode,
    write_json,
    write_records,
)


def test_repeated_images_of_a_padded_sampler_count_once(make_record):
    parts = [[make_record("a"), make_record("c")], [make_record("b"), make_record("a", ms=9.0)]]
    merged = merge_records(parts, ["a", "b", "c"])
    assert [record["expression_id"] for record in merged] == ["a", "b", "c"]
    assert merged[0]["ms"] == 5.0  # the first one stays


def test_missing_and_unexpected_expressions_are_counted_and_named(make_record):
    ids = [f"e{i}" for i in range(10)]
    parts = [[make_record(name) for name in ids[:2]], [make_record("stranger")]]
    with pytest.raises(ValueError, match=r"Of 10 expressions, 8 were not scored \(e2, e3, e4, e5, e6, \.\.\.\) and 1"):
        merge_records(parts, ids)


def test_two_expressions_of_one_id_are_refused(make_record):
    parts = [[make_record("a", expression="the cup")], [make_record("a", expression="the plate")]]
    with pytest.raises(ValueError, match="expression 'the cup' and 'the plate'"):
        merge_records(parts)


def test_a_split_with_repeated_ids_is_refused(make_record):
    with pytest.raises(ValueError, match="1 of the split's 3 expression ids are repeated"):
        merge_records([[make_record("a"), make_record("b")]], ["a", "b", "a"])


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 5))
def test_any_number_of_processes_gives_the_same_records(images, ranks):
    rows = [
        {"expression_id": f"e{i}", "image_id": i, "file_name": "", "expression": "", "gt_area": i}
        for i in range(images)
    ]
    padded = rows + [rows[i % images] for i in range(-images % ranks)]  # as DistributedSampler pads
    parts = [padded[rank::ranks] for rank in range(ranks)]
    assert merge_records(parts, [row["expression_id"] for row in rows]) == rows
    assert sorted(row["image_id"] for row in merge_records(parts)) == list(range(images))


def test_view_of_records_with_both_modes(make_record):
    forced = {"answered": True, "intersection": 3}
    both = [make_record("a", teacher_forced=forced)]
    assert records_of_mode(both, "generative")[0]["intersection"] == 0
    assert records_of_mode(both, "teacher_forced")[0]["intersection"] == 3
    assert records_of_mode(both, "teacher_forced")[0]["expression_id"] == "a"
    assert records_of_mode([make_record("a")], "teacher_forced") == []


def test_records_of_something_else_are_refused():
    with pytest.raises(ValueError, match="Record 0 .* lacks .*intersection.* referring_segmentation"):
        check_records([{"expression_id": "x"}])


def test_records_survive_the_file(make_record, tmp_path):
    records = [make_record("a", expression="das grüne Ding\n"), make_record("b", text='"quoted"')]
    path = write_records(tmp_path / "deep" / "test.jsonl", records)
    assert read_records(path) == records
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert [file.name for file in path.parent.iterdir()] == ["test.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "summary.json", {"giou": 0.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"giou": float("nan")})
    assert "0.5" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("line", "message"), [('{"expression', "line 2"), ("[1, 2]", "line 2: a record is a JSON object")]
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"expression_id": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_records(path)


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b'["x"]', b"[" * 100_000, b"5"])
def test_a_damaged_line_is_named(tmp_path, make_record, line):
    path = write_records(tmp_path / "records.jsonl", [make_record("a")])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(BadFileError, match=r"records\.jsonl, line 2") as error:
        read_records(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field",
    [
        {"intersection": "3"}, {"union": -1}, {"pred_area": 1.5}, {"gt_area": 10**400}, {"has_target": 1},
        {"answered": None}, {"mode": ["generative"]}, {"image_id": {}}, {"score": "high"}, {"ms": float("nan")},
        {"teacher_forced": 5}, {"teacher_forced": {"union": None}},
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named_with_its_record(make_record, field):
    named = "union" if "union" in str(field) else next(iter(field))
    with pytest.raises(BadFileError, match=rf"Record 1 \(b\).*{named}"):
        check_records([make_record("a"), {**make_record("b"), **field}])


@pytest.mark.parametrize("tags", [None, "few", ["few"], {"clutter": 1}, {"clutter": None}])
def test_tags_are_texts_by_name(make_record, tags):
    check_records([make_record(tags={"clutter": "few"}), make_record(tags={})])
    with pytest.raises(BadFileError, match="tags cannot be"):
        check_records([make_record(tags=tags)])


def test_torn_and_foreign_metrics_are_passed_over_by_name(tmp_path, caplog):
    assert read_metrics(tmp_path / "metrics_val_1.json") is None and not caplog.text
    for number, content in enumerate((b'{"agg_metrics": 0.', b"[1]", b'{"agg_metrics": "high"}', b"\xff", b"")):
        path = tmp_path / f"metrics_val_{number}.json"
        path.write_bytes(content)
        assert read_metrics(path) is None and path.name in caplog.text
    (tmp_path / "metrics_val_9.json").mkdir()
    assert read_metrics(tmp_path / "metrics_val_9.json") is None
    path.write_text('{"agg_metrics": 0.5}')
    assert read_metrics(path) == {"agg_metrics": 0.5}
