"""Setting up: what is installed, what is reused, what is explained."""

from __future__ import annotations

import re


def test_setup_installs_everything_then_reuses_it(workshop) -> None:
    code, output = workshop.run("run_scripts/setup.sh")
    assert code == 0, output
    log = workshop.log()
    assert log[0].startswith("-m venv --clear")
    pips = [line for line in log if line.startswith("-m pip install")]
    assert [("--no-deps" in line) for line in pips] == [False, True, True]
    assert "requirements-lavis.txt" in pips[1]
    assert pips[2].endswith(f"-e {workshop.root}")
    assert log[4] == "-m lavis_svp.cli zoo fetch --all"
    assert log[5].startswith("-m lavis_svp.cli data photos --root ")

    code, output = workshop.run("run_scripts/setup.sh", "--packages-only")
    assert code == 0
    assert workshop.log() == []

    (workshop.root / "requirements.txt").write_text("numpy==2.4.7\n")
    assert workshop.run("run_scripts/setup.sh", "--packages-only")[0] == 0
    assert len(workshop.log()) == 3, "changed requirements are installed into the environment that is there"


def test_interrupted_setup_is_continued(workshop) -> None:
    (workshop.folder / "exit_pip").write_text("1")
    code, output = workshop.run("run_scripts/train.sh")
    assert code == 1
    assert not any("lavis_svp" in line for line in workshop.log()), "nothing runs in a half-made environment"
    (workshop.folder / "exit_pip").unlink()

    packages = workshop.root / ".venv/lib/python3.11/site-packages"
    half, whole = packages / "half-1.0.dist-info", packages / "whole-1.0.dist-info"
    for folder in (half, whole):
        folder.mkdir(parents=True)
    (whole / "INSTALLER").write_text("pip")
    code, output = workshop.run("run_scripts/setup.sh")
    assert code == 0, output
    assert "half-1.0 was installed half way" in output
    assert not half.exists()
    assert whole.exists()
    assert not any("venv" in line.split()[:2] for line in workshop.log()), "the environment itself is kept"


def test_two_setups_wait_for_each_other(workshop) -> None:
    (workshop.folder / "slow").touch()
    both = [workshop.start("run_scripts/setup.sh") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("waiting for it to end" in output for output in outputs)
    lines = (workshop.folder / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["begin", "end"] * (len(lines) // 2)
    assert sum("pip install" in line for line in lines) == 3, "the second one finds the packages complete"


def test_missing_npm_is_explained_before_anything_is_done(workshop) -> None:
    (workshop.bin / "npm").unlink()
    code, output = workshop.run("run_scripts/test.sh")
    assert code == 1
    assert "npm was not found" in output
    assert "apt-get install npm" in output
    assert workshop.log() == []


def test_wrong_python_is_explained(workshop) -> None:
    (workshop.bin / "python3.11").unlink()
    workshop.stand_in("python3", '[ "$1" = --version ] && echo "Python 3.9.18" && exit; exit 1')
    code, output = workshop.run("run_scripts/train.sh")
    assert code == 1
    assert "Python 3.11 was not found" in output
    assert "Python 3.9.18" in output
    assert not (workshop.root / ".venv").exists()


def test_environment_of_another_python_is_not_touched(workshop) -> None:
    python = workshop.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\n[ \"$1\" = --version ] && echo 'Python 3.12.1' && exit; exit 1\n")
    python.chmod(0o755)
    code, output = workshop.run("run_scripts/setup.sh")
    assert code == 1
    assert "holds Python 3.12.1, not Python 3.11" in output
    assert "rm -rf" in output
    assert python.exists()


def test_full_disk_is_explained_with_numbers(workshop) -> None:
    workshop.stand_in("df", 'echo head; echo "disk 0 0 2500 98% /"')
    code, output = workshop.run("run_scripts/setup.sh")
    assert code == 1
    assert re.search(r"[78]\d\d\d MB more are needed in .*a clone, 2500 MB are free", output), output
    assert workshop.log() == []
