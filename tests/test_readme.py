"""The README's commands name what exists, and every YAML is readable."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]


def readme_commands() -> list[str]:
    """The lines of README.md's bash blocks, without comments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_exist(command: str) -> None:
    words = shlex.split(command, comments=True)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("run_scripts/") or word == "--cfg-path":
            path = following if word == "--cfg-path" else word
            assert (ROOT / path).is_file(), f"{path}, in the README's '{command}', does not exist"
        if word == "-m" and following.startswith("lavis_svp"):
            assert find_spec(following), f"{following}, in the README's '{command}', does not exist"


def all_yamls() -> list[Path]:
    return sorted(path for room in ("lavis_svp", "projects") for path in (ROOT / room).rglob("*.yaml"))


@pytest.mark.parametrize("path", all_yamls(), ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_is_readable(path: Path) -> None:
    assert OmegaConf.load(path), f"{path} is empty"
