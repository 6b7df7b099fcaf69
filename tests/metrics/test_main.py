"""The command that prints a finished run again."""

import json
import subprocess
import sys

import pytest

from lavis_svp.metrics.__main__ import main
from lavis_svp.metrics.files import write_records


@pytest.fixture
def result_files(four_cases, tmp_path):
    return [str(write_records(tmp_path / f"{name}_7.jsonl", four_cases)) for name in ("test", "photos")]


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
    for path, message in [(tmp_path / "no", "No such file"), (strange, "lacks expression_id")]:
        with pytest.raises(SystemExit) as stop:
            main([str(path)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_command_needs_neither_lavis_nor_torch(result_files):
    code = (
        "import runpy, sys; sys.argv = ['metrics', sys.argv[1], '--resamples', '5'];"
        "runpy.run_module('lavis_svp.metrics', run_name='__main__');"
        "assert not {'lavis', 'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, result_files[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean of kinds" in done.stdout
