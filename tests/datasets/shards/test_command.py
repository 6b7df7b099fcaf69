"""The command: converts, validates, tells; its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lavis_svp.cli.data import main
from lavis_svp.datasets.shards.read import ShardSource


def run(capsys, *arguments):
    try:
        code = main(["shards", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_convert_validate_info(tree, tmp_path, capsys):
    out = tmp_path / "shards"
    asked = ("convert", "--out", out, "--dataset", "refcocog", "--root", tree, "--images-per-shard", 7)
    code, said, _ = run(capsys, *asked)
    assert code == 0 and "shards in" in said
    code, said, _ = run(capsys, "validate", out)
    assert code == 0 and "0 faults" in said and "masks decoded" in said
    code, said, _ = run(capsys, "info", out)
    assert code == 0 and "train: " in said and '"split_by": "umd"' in said
    assert run(capsys, *asked)[0] == 0
    code, _, error = run(capsys, *asked[:-1], 8)
    assert code == 2 and "pictures_per_shard: 7 in the folder, 8 wanted" in error


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("flip", "train-000000.tar is not what was written"),
        ("padding", "train-000000.tar is not what was written"),
        ("cut", "train-000000.tar has 2,000 bytes"),
        ("missing", "train-000000.tar is missing"),
        ("stray", "other-000000.tar is not in the index"),
    ],
)
def test_validate_names_each_fault(shards, damage, capsys, fault, message):
    path = shards / "train-000000.tar"
    if fault == "flip":
        damage.flip(path, 1500)
    elif fault == "padding":
        damage.flip(path, path.stat().st_size - 1)
    elif fault == "cut":
        damage.cut(path, 2000)
    elif fault == "missing":
        path.unlink()
    else:
        (shards / "other-000000.tar").write_bytes(path.read_bytes())
    code, said, _ = run(capsys, "validate", shards)
    assert code == 1 and f"! {message}" in said
    lost = {"flip": 1, "padding": 0, "cut": 5, "missing": 5, "stray": 0}[fault]
    keys = [sample.key for sample in ShardSource(shards).index.samples if sample.shard == path.name]
    assert sum(any(key in line for key in keys) for line in said.splitlines()) == lost


def test_an_index_that_disagrees_is_a_fault(shards, forge, capsys):
    def change(content):
        content["samples"][3][3]["expressions"][0]["text"] = "something else"
        content["samples"][4][3]["image_key"] = "0" * 64

    key = ShardSource(shards).index.samples[3].key
    forge.index(shards, change)
    code, said, _ = run(capsys, "validate", shards)
    assert code == 1 and f"{key} (" in said and "its record and the index do not agree" in said
    assert "its sha256 is not the index's image_key" in said and "2 faults" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "refcoco"), "--root"),
        (("--dataset", "refcoco", "--root", "/nowhere"), "lavis-svp data doctor --root"),
        (("--coco", "x.json"), "--images"),
        (("--jsonl", "nowhere.jsonl"), "There is no file nowhere.jsonl"),
    ],
)
def test_wrong_usage(tmp_path, capsys, arguments, message):
    code, _, error = run(capsys, "convert", "--out", tmp_path, *arguments)
    assert code == 2 and message in error


def test_a_limit_of_pixels(tree, tmp_path, capsys):
    convert = ("convert", "--out", tmp_path, "--dataset", "refcocog", "--root", tree, "--max-image-pixels", 1000)
    code, _, error = run(capsys, *convert)
    assert code == 2 and "COCO_train2014" in error and "1,000" in error
    assert run(capsys, *convert[:-2])[0] == 0
    code, said, _ = run(capsys, "validate", tmp_path, "--max-image-pixels", 1000)
    assert code == 1 and "\n! train-000000.tar, train-" in said


def test_links_are_packed_only_if_they_are_to_be(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "secret.png")
    (folder / "0.png").symlink_to(tmp_path / "secret.png")
    expressions = [{"text": "the cup", "segmentation": [[1, 1, 5, 1, 5, 5]]}]
    (folder / "data.jsonl").write_text(json.dumps({"image": "0.png", "expressions": expressions}))
    convert = ("convert", "--out", tmp_path / "out", "--jsonl", folder / "data.jsonl")
    code, _, error = run(capsys, *convert)
    assert code == 2 and "secret.png" in error and "--follow-links" in error
    assert run(capsys, *convert, "--follow-links")[0] == 0


def test_unfinished_shards_are_no_shards(tmp_path, capsys):
    code, _, error = run(capsys, "validate", tmp_path)
    assert code == 2 and "convert" in error


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 9])
def test_killed_for_real_and_run_again(tree, tmp_path, shards):
    """-9 after some shards; the same command then ends with what an uninterrupted one writes."""
    options = ["--dataset", "refcoco", "--root", str(tree), "--images-per-shard", "1"]
    root = Path(__file__).resolve().parents[3]

    def start(out):
        program = [sys.executable, "-m", "lavis_svp.datasets.shards", "convert", "--out", str(out), *options]
        return subprocess.Popen(program, cwd=root, env=dict(os.environ), stderr=subprocess.DEVNULL)

    process = start(tmp_path / "out")
    deadline = time.time() + 120
    while len(list((tmp_path / "out").glob("*.tar"))) < shards and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "out" / ".train-000000.tar.0.tmp").write_bytes(b"half")
    assert start(tmp_path / "out").wait() == start(tmp_path / "whole").wait() == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written
    assert main(["shards", "validate", str(tmp_path / "out")]) == 0
