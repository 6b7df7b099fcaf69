"""The command that prints the tables of a finished evaluation again."""

import json
import subprocess
import sys

import pytest

from lavis_svp.cli.metrics import main
from lavis_svp.metrics.records import write_records


def record(number, has_target, answered, intersection):
    pred_area, gt_area = 60 * answered, 80 * has_target
    return {
        "expression_id": str(number), "image_id": number, "file_name": "", "split": "test", "expression": "thing",
        "kind": "attribute" if has_target else "no_target", "has_target": has_target, "mode": "generative",
        "answered": answered, "intersection": intersection, "union": pred_area + gt_area - intersection,
        "pred_area": pred_area, "gt_area": gt_area,
    }  # fmt: skip


@pytest.fixture
def result_files(tmp_path):
    cases = [
        record(0, False, False, 0),
        record(1, False, True, 0),
        record(2, True, False, 0),
        record(3, True, True, 40),
    ]
    return [str(write_records(tmp_path / f"{name}_7.jsonl", cases)) for name in ("test", "photos")]


def test_a_table_for_each_file(result_files, capsys):
    main([*result_files, "--resamples", "10"])
    out = capsys.readouterr().out
    assert out.count("mean of kinds") == 2
    assert f"{result_files[1]}: generative answers" in out


def test_json(result_files, capsys):
    main([result_files[0], "--json", "--resamples", "10"])
    assert json.loads(capsys.readouterr().out)[result_files[0]]["headline"]["giou_macro"] == 0.2


def test_a_missing_and_a_strange_file(tmp_path, capsys):
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"a": 1}\n')
    for path, message in [(tmp_path / "no", "There is no file"), (strange, "lacks expression_id")]:
        with pytest.raises(SystemExit) as stop:
            main([str(path)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_command_needs_neither_lavis_nor_torch(result_files):
    code = (
        "import runpy, sys; sys.argv = ['metrics', sys.argv[1], '--resamples', '5']\n"
        "status = 0\n"
        "try: runpy.run_module('lavis_svp.metrics', run_name='__main__')\n"
        "except SystemExit as stop: status = stop.code\n"
        "assert status == 0 and not {'lavis', 'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, result_files[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean of kinds" in done.stdout
