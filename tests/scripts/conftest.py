"""A copy of the scripts, with stand-ins for Python, npm and the disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["awk", "basename", "bash", "cat", "cp", "cut", "df", "dirname", "du"]
TOOLS += ["flock", "ls", "mkdir", "mktemp", "mv", "npm", "realpath", "rm", "sed", "sha256sum", "sleep", "sort", "xargs"]

# Says yes to every question and writes down what it is asked to run. `exit_MODULE` holds a code to leave with.
FAKE_PYTHON = """
here="{log_folder}"
if [ "$1" = -c ] || [ "$1" = - ]; then exit 0; fi
if [ "$1" = --version ]; then echo "Python 3.11.99"; exit; fi
if [ "$2" = pip ] && [ "$3" = --version ]; then exit 0; fi
echo "begin $*" >> "$here/log"
pwd > "$here/folder"
if [ "$2" = venv ]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; fi
if [ -e "$here/slow" ]; then sleep 0.05; fi
echo "end" >> "$here/log"
if [ -e "$here/exit_$2" ]; then exit "$(cat "$here/exit_$2")"; fi
"""


class Workshop:
    """A copy of the scripts in a folder with a space in its name, and a PATH of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        shutil.copytree(ROOT / "run_scripts", self.root / "run_scripts")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for path in [*ROOT.glob("requirements*.txt"), ROOT / "constraints.txt", ROOT / "setup.py"]:
            shutil.copy(path, self.root)
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"{tool} is not on this machine"
            (self.bin / tool).symlink_to(found)
        self.stand_in("python3.11", FAKE_PYTHON.format(log_folder=folder))
        self.stand_in("df", 'echo head; echo "disk 0 0 999999 0% /"')

    def stand_in(self, name: str, body: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        path.chmod(0o755)

    def start(self, script: str, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.folder / "home"), "LC_ALL": "C"}
        (self.folder / "home").mkdir(exist_ok=True)
        command = [str(shutil.which("bash")), str(self.root / script), *arguments]
        return subprocess.Popen(
            command,
            cwd=cwd or self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
        process = self.start(script, *arguments, cwd=cwd)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def log(self) -> list[str]:
        """What Python was asked to run since the last call."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.removeprefix("begin ") for line in lines if line.startswith("begin ")]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)
