"""The run section: defaults, conversion, wrong values."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from lavis_svp.runners.options import (
    LAVIS_KEYS,
    RunOptions,
    known_run_keys,
    read_options,
    resolve_device,
    with_defaults,
)

NEEDED = {"task": "t", "output_dir": "o"}


def test_every_key_of_lavis_own_runners_is_known():
    lavis = (
        "runner task device distributed evaluate output_dir init_lr min_lr warmup_lr warmup_steps lr_sched "
        "weight_decay beta2 num_workers batch_size_train batch_size_eval seed dist_url max_epoch max_iters "
        "iters_per_inner_epoch amp accum_grad_iters log_freq lr_decay_rate resume_ckpt_path use_dist_eval_sampler "
        "train_splits valid_splits test_splits train_dataset_ratios"
    )
    assert set(lavis.split()) <= set(known_run_keys())
    assert not set(LAVIS_KEYS) & {field.name for field in fields(RunOptions)}


def test_text_numbers_and_lists_are_read():
    options = read_options({**NEEDED, "init_lr": "1e-4", "test_splits": ["test"], "valid_splits": None, "seed": 3})
    assert options.init_lr == 1e-4 and options.test_splits == ("test",) and options.valid_splits == ()


def test_defaults_are_plain_yaml_values_and_given_ones_stay():
    run = with_defaults({**NEEDED, "max_epoch": 3, "seed": 1})
    assert run["seed"] == 1 and run["max_epoch"] == 3 and run["train_splits"] == ["train"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"seed": True}, "seed"),
        ({"amp": 1}, "amp"),
        ({"num_workers": -1}, "num_workers"),
        ({"find_unused_parameters": "never"}, "find_unused_parameters"),
        ({"init_lr": "x"}, "init_lr"),
    ],
)
def test_a_wrong_value_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        read_options({**NEEDED, **wrong})


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="task, output_dir"):
        read_options({})


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("meta", "gpu", "cuda:x"):
        with pytest.raises(ValueError, match="run.device is"):
            resolve_device(name)
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="no CUDA"):
            resolve_device("cuda")


def test_a_process_of_several_gets_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda", 1, processes=2) == torch.device("cuda", 1)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"cuda:0 to cuda:1"):
        resolve_device("cuda:7")
    with pytest.raises(ValueError, match="2 processes run, each on a GPU of its own: set run.device to cuda"):
        resolve_device("cuda:1", 0, processes=2)
