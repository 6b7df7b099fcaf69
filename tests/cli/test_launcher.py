"""Options for several processes and machines: the command that they become, contradictions, two real processes."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavis_svp.cli import launcher, train

ROOT = Path(__file__).resolve().parents[2]


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launcher.add_launch_options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("", ""),
        ("--nproc 1 --nnodes 1", ""),
        ("--nproc 2", "torch.distributed.run --standalone --nproc_per_node=2 -m"),
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
def test_options_become_a_launcher(tmp_path, monkeypatch, given: str, becomes: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("one slots=4\ntwo slots=4\n")
    assert launcher.launch_command(parsed(*given.split())) == becomes.split()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--hostfile hosts", "needs --launcher deepspeed"),
        ("--launcher deepspeed --hostfile nowhere", "no file 'nowhere'"),
        ("--launcher deepspeed --nnodes 2", "needs --hostfile"),
        ("--launcher deepspeed --node-rank 0", "is for --launcher torch"),
        ("--nnodes 2", "needs --master-addr"),
        ("--nnodes 2 --master-addr one --node-rank 2", "below --nnodes 2"),
        ("--master-addr one", "need --nnodes"),
        ("--launcher mpi", "'mpi'"),
        ("--nnodes 0", "'0'"),
        ("--nproc none", "'none'"),
        ("--master-port=", "''"),
    ],
)
def test_contradictions_end_the_command(given: str, words: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--cfg-path", "a.yaml", *given.split()])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_each_process_gets_the_other_words(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(os, "execv", lambda program, words: ran.append(words) or sys.exit())
    words = [
        "--nproc",
        "2",
        "--cfg-path",
        "a file.yaml",
        "--launcher=torch",
        "--options",
        "run.seed=1",
        "run.n=two words",
    ]
    with pytest.raises(SystemExit):
        train.main(words)
    (command,) = ran
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[-8:] == ["-m", "lavis_svp.cli", "train", "--cfg-path", "a file.yaml", *words[-3:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "deepspeed"])
def test_two_processes_train_for_real(tmp_path: Path, name: str) -> None:
    """The toy of the runner's tests, started by each launcher, in two gloo processes for two steps."""
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    port_option = ["--master-port", port] if name == "deepspeed" else []
    start = launcher.launch_command(parsed("--launcher", name, "--nproc", "2", *port_option))
    options = ["run.runner=runner_deepspeed", "run.max_iters=2", "run.warmup_steps=0", "run.eval_every=0"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/runners")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *start, "toy", str(tmp_path / "run"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    contents = torch.load(tmp_path / "run/out/checkpoint_2.pth", weights_only=True)
    assert contents["iters"] == 2 and contents["config"]["run"]["world_size"] == 2
