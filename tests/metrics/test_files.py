"""Result files: round trip, and what a broken file says."""

import pytest

from lavis_svp.metrics.files import read_records, write_json, write_records


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
    ("line", "message"), [('{"expression', "line 2: .*Evaluate again"), ("[1, 2]", "line 2: a record is a JSON object")]
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"expression_id": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_records(path)
