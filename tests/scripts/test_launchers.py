"""Training and evaluation: arguments, processes, stages."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = {"train.sh": "lavis_svp.train", "eval.sh": "lavis_svp.evaluate"}


@pytest.mark.parametrize(("script", "module"), LAUNCHED.items())
def test_launch_passes_arguments_through(workshop, script: str, module: str) -> None:
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
def test_launchers(workshop, script: str, module: str, given: str, becomes: str) -> None:
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
def test_launchers_that_do_not_go_together(workshop, given: str, words: str) -> None:
    code, output = workshop.run("run_scripts/train.sh", *given.split())
    assert code == 1 and words in output and output.count("\n") == 1, output
    assert workshop.log() == []


def test_stages_pass_the_launcher_on(workshop) -> None:
    given = ["--stages", "one.yaml", "--launcher", "deepspeed", "--nproc", "2"]
    assert workshop.run("run_scripts/train.sh", *given)[0] == 0
    assert workshop.log()[-1].endswith(" ".join(given))


def test_stages_are_run_by_the_script_itself(workshop) -> None:
    arguments = ["--nproc", "2", "--stages", "one.yaml", "two.yaml", "--options", "run.seed=1"]
    assert workshop.run("run_scripts/train.sh", *arguments)[0] == 0
    words = shlex.split(workshop.log()[-1].replace("--launch ", "--launch '").replace(" --nproc", "' --nproc"))
    assert words[:3] == ["-m", "lavis_svp.stages", "--launch"] and words[4:] == arguments
    assert shlex.split(words[3]) == ["bash", f"{workshop.root}/run_scripts/train.sh"]
    (workshop.folder / "exit_lavis_svp.stages").write_text("7")
    assert workshop.run("run_scripts/train.sh", *arguments)[0] == 7


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
