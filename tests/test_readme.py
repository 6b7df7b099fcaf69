"""The README: each of its commands and its Python run here, its folder picture is true, and it stays short.

Some commands take hours or need a GPU: ``train.sh`` runs with fewer steps in tests/test_end_to_end.py, ``--stages`` in
tests/cli/test_stages.py, ``gpu_check.sh`` on the CPU in tests/benchmarks/test_gpu_check.py, and ``superpixels make
--cfg-path`` on a small YAML in tests/cli/test_superpixels.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_svp.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 130
RUN_ELSEWHERE = ("run_scripts/test.sh", "run_scripts/train.sh", "run_scripts/gpu_check.sh", "--cfg-path")


def blocks(language: str) -> list[str]:
    """The contents of the README's fenced blocks of a language, "" for those without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [content for name, content in fences if name == language]


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the README's commands name: ``photo.jpg`` and ``photos/``."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)
    (tmp_path / "photos").mkdir()
    for path in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        image.save(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photo.jpg"


@pytest.mark.parametrize("command", [one for one in COMMANDS if not any(name in one for name in RUN_ELSEWHERE)])
def test_a_command_of_the_readme_runs(command, photo, weights, capsys):
    words = shlex.split(command, comments=True)
    if words[0] == "bash":  # the scripts set up and pass their arguments on: run_scripts/ is tested in tests/scripts
        assert (ROOT / words[1]).is_file()
        words = ["lavis-svp", "segment", *(words[2:] or ["the cat"])]
    assert words[0] == "lavis-svp"
    before = {path for path in photo.parent.rglob("*") if path.is_file()}
    if words[1:3] == ["superpixels", "make"]:
        words[words.index("--workers") + 1] = "1"
    assert main(words[1:]) == 0
    assert {path for path in photo.parent.rglob("*") if path.is_file()} > before, capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_files_that_a_command_names_exist(command):
    words = shlex.split(command, comments=True)
    for path in (word for word in words if word.startswith(("run_scripts/", "projects/"))):
        assert (ROOT / path).is_file()


def test_commands_in_the_text_exist():
    from lavis_svp.cli.main import COMMANDS as KNOWN

    assert set(re.findall(r"`lavis-svp (\w+)", TEXT)) <= set(KNOWN)


def test_the_python_of_the_readme_runs(photo, weights):
    model_code, projector_code = blocks("python")
    names = {"pil_image": Image.open(photo).convert("RGB")}
    exec(compile(model_code, "README.md", "exec"), names)
    assert names["mask"].shape == names["pil_image"].size[::-1] and names["mask"].dtype == np.uint8
    build, swap = projector_code.split("visual = ")[0], projector_code.splitlines()[-1]
    exec(compile(build, "README.md", "exec"), names)  # features, superpixels and a host: tests/projectors, tests/hosts
    assert names["projector"].llm_dim == 4096 and callable(names["swap_projector"]) and "swap_projector(" in swap


def test_the_folder_picture_is_true():
    picture = next(block for block in blocks("") if block.startswith("lavis_svp/"))
    rooms = {path.name for path in (ROOT / "lavis_svp").iterdir() if path.is_dir() and not path.name.startswith("_")}
    named = set(re.findall(r"([a-z_]+)/", picture))
    assert rooms <= named, f"missing in the README's picture: {sorted(rooms - named)}"
    top = {"lavis_svp", "projects", "run_scripts", "docs", "benchmarks", "tests"}
    inner = {"svp", "baselines", "sam", "one_pass", "train", "eval", "ablation", "comparison", "deepspeed"}
    assert named == rooms | top | inner | {"results", "reports"}
    for folder in ("superpixels/one_pass", "superpixels/sam", "projectors/svp", "projectors/baselines"):
        assert (ROOT / "lavis_svp" / folder).is_dir()


def test_it_stays_short_and_docs_are_ten_pages_at_most():
    assert len(TEXT.splitlines()) <= MAX_LINES
    assert len(list((ROOT / "docs").glob("*.md"))) <= 10
