"""The scripts, run in a copy of their own with stand-ins for Python, npm and the disk."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
SOURCED = ("common.sh", "rows.sh")
SCRIPTS = sorted(path.name for path in (ROOT / "run_scripts").glob("*.sh") if path.name not in SOURCED)
LAUNCHED = {"train.sh": "lavis_svp.train", "eval.sh": "lavis_svp.evaluate"}
TOOLS = ["awk", "basename", "bash", "cat", "cp", "cut", "df", "dirname", "du"]
TOOLS += ["flock", "mkdir", "mv", "npm", "rm", "sed", "sha256sum", "sleep"]

# Says yes to every question and writes down what it is asked to run. `exit_MODULE` holds a code to leave with.
FAKE_PYTHON = """
here="{log_folder}"
if [ "$1" = -c ]; then exit 0; fi
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


@pytest.mark.parametrize("script", [*(f"run_scripts/{name}" for name in (*SCRIPTS, *SOURCED)), ".ci/run"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_sets_nothing_up(workshop: Workshop, script: str) -> None:
    code, output = workshop.run(f"run_scripts/{script}", "--help")
    assert code == 0
    assert f"bash run_scripts/{script}" in output
    assert not workshop.log()


def test_setup_installs_everything_then_reuses_it(workshop: Workshop) -> None:
    code, output = workshop.run("run_scripts/setup.sh")
    assert code == 0, output
    log = workshop.log()
    assert log[0].startswith("-m venv --clear")
    pips = [line for line in log if line.startswith("-m pip install")]
    assert [("--no-deps" in line) for line in pips] == [False, True, True]
    assert "requirements-lavis.txt" in pips[1]
    assert pips[2].endswith(f"-e {workshop.root}")
    assert log[4] == "-m lavis_svp.zoo fetch --all"
    assert log[5].startswith("-m lavis_svp.datasets.photos --root ")

    code, output = workshop.run("run_scripts/setup.sh", "--packages-only")
    assert code == 0
    assert workshop.log() == []

    (workshop.root / "requirements.txt").write_text("numpy==2.4.7\n")
    assert workshop.run("run_scripts/setup.sh", "--packages-only")[0] == 0
    assert len(workshop.log()) == 3, "changed requirements are installed into the environment that is there"


def test_interrupted_setup_is_continued(workshop: Workshop) -> None:
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


def test_two_setups_wait_for_each_other(workshop: Workshop) -> None:
    (workshop.folder / "slow").touch()
    both = [workshop.start("run_scripts/setup.sh") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("waiting for it to end" in output for output in outputs)
    lines = (workshop.folder / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["begin", "end"] * (len(lines) // 2)
    assert sum("pip install" in line for line in lines) == 3, "the second one finds the packages complete"


def test_missing_npm_is_explained_before_anything_is_done(workshop: Workshop) -> None:
    (workshop.bin / "npm").unlink()
    code, output = workshop.run("run_scripts/test.sh")
    assert code == 1
    assert "npm was not found" in output
    assert "apt-get install npm" in output
    assert workshop.log() == []


def test_wrong_python_is_explained(workshop: Workshop) -> None:
    (workshop.bin / "python3.11").unlink()
    workshop.stand_in("python3", '[ "$1" = --version ] && echo "Python 3.9.18" && exit; exit 1')
    code, output = workshop.run("run_scripts/train.sh")
    assert code == 1
    assert "Python 3.11 was not found" in output
    assert "Python 3.9.18" in output
    assert not (workshop.root / ".venv").exists()


def test_environment_of_another_python_is_not_touched(workshop: Workshop) -> None:
    python = workshop.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\n[ \"$1\" = --version ] && echo 'Python 3.12.1' && exit; exit 1\n")
    python.chmod(0o755)
    code, output = workshop.run("run_scripts/setup.sh")
    assert code == 1
    assert "holds Python 3.12.1, not Python 3.11" in output
    assert "rm -rf" in output
    assert python.exists()


def test_full_disk_is_explained_with_numbers(workshop: Workshop) -> None:
    workshop.stand_in("df", 'echo head; echo "disk 0 0 2500 98% /"')
    code, output = workshop.run("run_scripts/setup.sh")
    assert code == 1
    assert re.search(r"[78]\d\d\d MB more are needed in .*a clone, 2500 MB are free", output), output
    assert workshop.log() == []


@pytest.mark.parametrize(("script", "module"), LAUNCHED.items())
def test_launch_passes_arguments_through(workshop: Workshop, script: str, module: str) -> None:
    cfg = ["--cfg-path", "a file.yaml", "--options", "run.seed=1", "run.note=two words"]
    assert workshop.run(f"run_scripts/{script}", *cfg, cwd=workshop.root / "run_scripts")[0] == 0
    assert workshop.log()[-1] == f"-m {module} " + " ".join(cfg)

    assert workshop.run(f"run_scripts/{script}", "--nproc", "2", *cfg)[0] == 0
    launcher = "torch.distributed.run --standalone --nproc_per_node=2"
    assert workshop.log()[-1] == f"-m {launcher} -m {module} " + " ".join(cfg)

    assert workshop.run(f"run_scripts/{script}")[0] == 0
    default = workshop.log()[-1].removeprefix(f"-m {module} --cfg-path ")
    assert (workshop.folder / "folder").read_text().strip() == str(workshop.root)
    assert (ROOT / default).is_file()

    code, output = workshop.run(f"run_scripts/{script}", "--nproc=none")
    assert code == 1
    assert "'none'" in output

    (workshop.folder / f"exit_{module}").write_text("7")
    assert workshop.run(f"run_scripts/{script}")[0] == 7


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        (
            "--nnodes 2 --nproc 8 --node-rank 1 --master-addr one",
            "torch.distributed.run --nnodes=2 --nproc_per_node=8 --node_rank=1 --master_addr=one "
            "--master_port=29500 -m",
        ),
        (
            "--nnodes=2 --master-addr=one --master-port=7 --launcher=torch",
            "torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=lavis-svp "
            "--rdzv_endpoint=one:7 -m",
        ),
        ("--launcher deepspeed --nproc 2", "deepspeed.launcher.runner --no_local_rank --num_gpus 2 --module"),
        (
            "--launcher deepspeed --hostfile hosts --nnodes 2 --nproc 4 --master-addr one --master-port 7",
            "deepspeed.launcher.runner --no_local_rank --hostfile hosts --num_nodes 2 --num_gpus 4 --master_addr one "
            "--master_port 7 --module",
        ),
    ],
)
@pytest.mark.parametrize(("script", "module"), LAUNCHED.items())
def test_launchers(workshop: Workshop, script: str, module: str, given: str, becomes: str) -> None:
    (workshop.folder / "hosts").write_text("one slots=4\ntwo slots=4\n")
    code, output = workshop.run(f"run_scripts/{script}", *given.split(), "--cfg-path", "a file.yaml")
    assert code == 0, output
    assert workshop.log()[-1] == f"-m {becomes} {module} --cfg-path a file.yaml"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--launcher mpi", "'mpi'"),
        ("--hostfile hosts", "needs --launcher deepspeed"),
        ("--launcher deepspeed --hostfile nowhere", "no file 'nowhere'"),
        ("--launcher deepspeed --nnodes 2", "needs --hostfile"),
        ("--launcher deepspeed --node-rank 0", "is for --launcher torch"),
        ("--nnodes 2", "needs --master-addr"),
        ("--nnodes 2 --master-addr one --node-rank 2", "below --nnodes 2"),
        ("--master-addr one", "need --nnodes"),
        ("--nnodes 0", "'0'"),
        ("--master-port=", "needs a value"),
        ("--launcher", "needs a value"),
    ],
)
def test_launchers_that_do_not_go_together(workshop: Workshop, given: str, words: str) -> None:
    code, output = workshop.run("run_scripts/train.sh", *given.split())
    assert code == 1 and words in output and output.count("\n") == 1, output
    assert workshop.log() == []


def test_stages_pass_the_launcher_on(workshop: Workshop) -> None:
    given = ["--stages", "one.yaml", "--launcher", "deepspeed", "--nproc", "2"]
    assert workshop.run("run_scripts/train.sh", *given)[0] == 0
    assert workshop.log()[-1].endswith(" ".join(given))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch", "deepspeed"])
def test_two_processes_train_for_real(tmp_path: Path, launcher: str) -> None:
    """The toy of the runner's tests, started by train.sh, in two gloo processes for two steps."""
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
    clone = tmp_path / "a clone"
    shutil.copytree(ROOT / "run_scripts", clone / "run_scripts")
    (clone / "run_scripts/setup.sh").write_text("exit 0\n")  # this environment is complete
    (clone / ".venv").symlink_to(sys.prefix)
    script = clone / "run_scripts/train.sh"
    script.write_text(script.read_text().replace("launch lavis_svp.train", "launch toy"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    given = ["--launcher", launcher, "--nproc", "2", *(["--master-port", port] if launcher == "deepspeed" else [])]
    options = ["run.runner=runner_deepspeed", "run.max_iters=2", "run.warmup_steps=0", "run.eval_every=0"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/runners")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(script), *given, str(tmp_path / "run"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    contents = torch.load(tmp_path / "run/out/checkpoint_2.pth", weights_only=True)
    assert contents["iters"] == 2 and contents["config"]["run"]["world_size"] == 2


def test_stages_are_run_by_the_script_itself(workshop: Workshop) -> None:
    arguments = ["--nproc", "2", "--stages", "one.yaml", "two.yaml", "--options", "run.seed=1"]
    assert workshop.run("run_scripts/train.sh", *arguments)[0] == 0
    words = shlex.split(workshop.log()[-1].replace("--launch ", "--launch '").replace(" --nproc", "' --nproc"))
    assert words[:3] == ["-m", "lavis_svp.stages", "--launch"] and words[4:] == arguments
    assert shlex.split(words[3]) == ["bash", f"{workshop.root}/run_scripts/train.sh"]
    (workshop.folder / "exit_lavis_svp.stages").write_text("7")
    assert workshop.run("run_scripts/train.sh", *arguments)[0] == 7


def test_all_splits_are_evaluated_one_after_another(workshop: Workshop) -> None:
    shutil.copytree(ROOT / "projects/svp/eval", workshop.root / "projects/svp/eval")
    given = ["--checkpoint", "a file.pth", "--nproc", "2", "--options", "run.seed=1"]
    assert workshop.run("run_scripts/eval_refcoco.sh", *given)[0] == 0
    lines = [line for line in workshop.log() if "lavis_svp.evaluate" in line]
    assert len(lines) == 8
    assert all("--checkpoint a file.pth" in line and line.endswith(" run.seed=1") for line in lines)
    chosen = [re.search(r"eval/(\w+)_tiny.yaml .* datasets.(\w+)_seg.type=(\w+) ", line) for line in lines]
    assert all(match and match[1] == match[2] for match in chosen)
    splits = [(match[1], match[3]) for match in chosen if match]
    expected = {name: ["val", "testA", "testB"] for name in ("refcoco", "refcoco_plus")} | {"refcocog": ["val", "test"]}
    assert splits == [(name, split) for name, types in expected.items() for split in types]
    for name, split in splits:
        assert (ROOT / f"lavis_svp/configs/datasets/{name}/{split}.yaml").is_file()


def test_a_split_that_does_not_exist_is_named(workshop: Workshop) -> None:
    command = workshop.root / "run_scripts/eval_refcoco.sh"
    code = subprocess.run(
        ["bash", str(command)], env={"PATH": os.environ["PATH"], "SPLITS": "coco:val"}, capture_output=True, text=True
    )
    assert code.returncode == 1 and "no data set 'coco'" in code.stderr


def test_ablation_rows_run_one_after_another_and_once(workshop: Workshop) -> None:
    shutil.copytree(ROOT / "projects/svp/ablation", workshop.root / "projects/svp/ablation")
    result = workshop.folder / "output/svp/ablation/sspe_off/result"
    result.mkdir(parents=True)
    (result / "metrics_test_1500.json").touch()

    def launched(*given: str) -> list[tuple[str, str]]:
        """(YAML, what stands behind it) of each training."""
        code, output = workshop.run("run_scripts/ablation.sh", *given)
        assert code == 0, output
        lines = [line for line in workshop.log() if "lavis_svp.train" in line]
        found = [re.search(r"--cfg-path .*/ablation/(\w+).yaml (.*)", line) for line in lines]
        return [(match[1], match[2]) for match in found if match]

    rows = sorted(path.stem for path in (ROOT / "projects/svp/ablation").glob("*.yaml"))
    assert [row for row, _ in launched()] == [row for row in rows if row != "sspe_off"]
    assert launched("sspe_off", "full", "--nproc", "1", "--options", "run.max_iters=2") == [
        ("full", "--options run.output_dir=output/svp/ablation/full run.max_iters=2")
    ]
    assert launched("sspe_off", "--seeds", "1 2") == [
        ("sspe_off", f"--options run.output_dir=output/svp/ablation/sspe_off_seed{seed} run.seed={seed}")
        for seed in (1, 2)
    ]
    (workshop.folder / "exit_lavis_svp.train").write_text("3")
    assert workshop.run("run_scripts/ablation.sh", "full", "mask_pool")[0] == 3
    assert sum("lavis_svp.train" in line for line in workshop.log()) == 1, "a row that fails ends the script"


def test_the_comparison_names_its_budget_and_reads_equal_time_from_the_measurement(workshop: Workshop) -> None:
    shutil.copytree(ROOT / "projects/svp/comparison", workshop.root / "projects/svp/comparison")
    assert workshop.run("run_scripts/compare.sh", "svp", "mlp", "--seeds", "1")[0] == 0
    lines = [line for line in workshop.log() if "lavis_svp.train" in line]
    assert [line.partition("--options ")[2] for line in lines] == [
        f"run.output_dir=output/svp/comparison/{row}_steps_seed1 run.seed=1" for row in ("svp", "mlp")
    ]
    assert workshop.run("run_scripts/compare.sh", "mlp", "--budget", "time")[0] == 0
    lines = workshop.log()
    assert any(line.endswith("benchmarks/step_times.py steps mlp") for line in lines)
    assert "output_dir=output/svp/comparison/mlp_time" in lines[-1]
    for given, words in (("--budget tokens", "steps or time, got 'tokens'"), ("mlpp", "no row 'mlpp'")):
        code, output = workshop.run("run_scripts/compare.sh", *given.split())
        assert code == 1 and re.search(words, output), output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("spe_off", "no row 'spe_off'.*sspe_off.yaml"),
        ("full --seeds one", "--seeds must be a whole number"),
        ("full --options run.seed=3", "given by --seeds"),
        ("--cfg-path full.yaml", "Name a row"),
    ],
)
def test_ablation_explains_what_it_does_not_take(workshop: Workshop, given: str, words: str) -> None:
    shutil.copytree(ROOT / "projects/svp/ablation", workshop.root / "projects/svp/ablation")
    code, output = workshop.run("run_scripts/ablation.sh", *given.split())
    assert code == 1 and re.search(words, output, flags=re.DOTALL), output
    assert not workshop.log()


def test_demo_needs_an_expression(workshop: Workshop) -> None:
    code, output = workshop.run("run_scripts/demo.sh")
    assert code == 1
    assert "expression is missing" in output
    assert workshop.run("run_scripts/demo.sh", "the red circle")[0] == 0
    assert workshop.log()[-1] == "-m lavis_svp.demo the red circle"


@pytest.mark.parametrize("script", ["demo.sh", "eval.sh"])
def test_scripts_say_where_training_writes(script: str) -> None:
    output = OmegaConf.load(ROOT / "projects/svp/train/refshapes_tiny.yaml").run.output_dir
    assert f"--checkpoint {output}" in (ROOT / "run_scripts" / script).read_text()


@pytest.mark.parametrize("script", ["run_scripts/test.sh", ".ci/run"])
def test_test_script_checks_then_tests(workshop: Workshop, script: str) -> None:
    assert workshop.run(script, "-k", "a b")[0] == 0
    log = [line.removeprefix("-m ") for line in workshop.log()]
    assert [line.split()[0] for line in log[-4:]] == ["ruff", "ruff", "mypy", "pytest"]
    assert "-k a b" in log[-1]
    assert "not slow" in log[-1]

    assert workshop.run(script, "--all")[0] == 0
    assert "slow" not in workshop.log()[-1]

    (workshop.folder / "exit_pytest").write_text("3")
    assert workshop.run(script)[0] == 3
    (workshop.folder / "exit_ruff").write_text("1")
    workshop.log()
    code, output = workshop.run(script)
    assert code == 1
    assert "ruff check found faults" in output


def all_yamls() -> list[Path]:
    return sorted(path for room in ("lavis_svp", "projects") for path in (ROOT / room).rglob("*.yaml"))


@pytest.mark.parametrize("path", all_yamls(), ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_is_readable(path: Path) -> None:
    assert OmegaConf.load(path), f"{path} is empty"


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


def test_scripts_can_be_executed() -> None:
    for path in [*(ROOT / "run_scripts" / name for name in SCRIPTS), ROOT / ".ci/run"]:
        assert os.access(path, os.X_OK), f"{path} is not executable"
