"""Checkpoints: what is in them, and what happens to damaged, foreign and dangerous ones."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import resource
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lavis_svp.common.checkpoints import (
    TENSORBOARD,
    CorruptCheckpointError,
    ShardedCheckpointError,
    WrongCheckpointError,
    content_digest,
    load_trained_state,
    newest_checkpoint,
    numbered_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    remove_unfinished,
    save_checkpoint,
    set_aside,
    set_foreign_aside,
    trained_state,
)
from lavis_svp.common.files import BadFileError


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.frozen = nn.BatchNorm1d(width).requires_grad_(False)
        self.trained = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)


def save(folder, iters, width=3):
    path = folder / f"checkpoint_{iters}.pth"
    save_checkpoint(path, {"model": trained_state(Net(width)), "iters": iters})
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint's path, and its content twice: as bytes and as tensors."""
    path = save(tmp_path_factory.mktemp("sound"), 1, width=32)
    return path, {"bytes": path.read_bytes(), "model": read_checkpoint(path)["model"]}


def test_only_what_training_changes_is_kept():
    assert set(trained_state(Net())) == {
        "trained.weight", "trained.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip


def test_a_model_may_say_what_is_kept():
    net = Net()
    net.checkpoint_state = lambda: {"trained.bias": net.trained.bias}
    assert set(trained_state(net)) == {"trained.bias"}


def test_weights_return_bit_for_bit(tmp_path):
    first, second = Net(), Net()
    save_checkpoint(tmp_path / "a.pth", {"model": trained_state(first)})
    load_trained_state(second, read_checkpoint(tmp_path / "a.pth")["model"], "a.pth")
    for name, tensor in trained_state(first).items():
        assert torch.equal(tensor, trained_state(second)[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("trained.bias"), "missing in the file: trained.bias"),
        (lambda state: state.update(other=torch.zeros(1)), "unknown to the model: other"),
        (lambda state: state.update({"norm.bias": torch.zeros(9)}), r"norm.bias: \(9,\) in the file, \(3,\)"),
    ],
)
def test_another_models_checkpoint_is_named(change, named):
    state = trained_state(Net())
    change(state)
    with pytest.raises(WrongCheckpointError, match=named):
        load_trained_state(Net(), state, "x.pth")


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1, exclude_max=True))
def test_a_flipped_byte_is_found_or_harmless(sound, where):
    path, state = sound
    content = bytearray(state["bytes"])
    content[int(where * len(content))] ^= 0xFF
    path.write_bytes(content)
    try:
        read = read_checkpoint(path)["model"]
    except CorruptCheckpointError as error:
        assert "checkpoint_1" in str(error)
    else:
        assert all(torch.equal(read[name], tensor) for name, tensor in state["model"].items())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_newest_one_falls_back_with_a_warning(tmp_path, share, caplog):
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    newest.write_bytes(newest.read_bytes()[: int(share * newest.stat().st_size)])
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == before
    assert "checkpoint_10" in caplog.text


def test_nothing_sound_means_none(tmp_path):
    (tmp_path / "checkpoint_3.pth").write_bytes(b"nothing")
    assert newest_checkpoint(tmp_path) is None


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Evil()}))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(CorruptCheckpointError):
            read_checkpoint(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_a_missing_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        read_checkpoint(tmp_path / "gone.pth")


def test_newest_means_most_steps_and_old_ones_go(tmp_path):
    for iters in (2, 10, 9):
        save(tmp_path, iters)
    (tmp_path / "checkpoint_best.pth").touch()
    (tmp_path / ".saving-checkpoint_11.pth").touch()
    remove_unfinished(tmp_path)
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in numbered_checkpoints(tmp_path)] == ["checkpoint_10.pth", "checkpoint_9.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_10.pth", "checkpoint_9.pth", "checkpoint_best.pth",
    ]  # fmt: skip


def test_an_earlier_run_is_set_aside_not_deleted(tmp_path):
    (tmp_path / "result").mkdir()
    assert set_aside(tmp_path) is None
    for number in (1, 2):
        save(tmp_path, 5)
        (tmp_path / "result" / "metrics_val_5.json").touch()
        (tmp_path / TENSORBOARD).mkdir()
        assert set_aside(tmp_path) == tmp_path / f"earlier-{number}"
        assert (tmp_path / f"earlier-{number}" / "result" / "metrics_val_5.json").exists()
        assert (tmp_path / f"earlier-{number}" / TENSORBOARD).exists() and not (tmp_path / TENSORBOARD).exists()
        assert numbered_checkpoints(tmp_path) == [] and not any((tmp_path / "result").iterdir())


def test_curves_of_a_run_without_a_checkpoint_stay(tmp_path):
    (tmp_path / TENSORBOARD).mkdir()
    assert set_aside(tmp_path) is None and (tmp_path / TENSORBOARD).exists()


def test_a_digest_tells_any_change_of_content():
    contents = {"model": {"a": torch.arange(4.0), "b": torch.tensor(1)}, "config": {"lr": 0.1, "betas": [0.9, 0.95]}}
    digest = content_digest(contents)
    assert digest == content_digest({"model": dict(contents["model"]), "config": {"lr": 0.1, "betas": [0.9, 0.95]}})
    for other in (
        {**contents, "config": {"lr": 0.2, "betas": [0.9, 0.95]}},
        {**contents, "model": {"a": torch.arange(4.0).half(), "b": torch.tensor(1)}},
        {**contents, "model": {"a": torch.arange(4.0).reshape(2, 2), "b": torch.tensor(1)}},
        {**contents, "model": {"a": torch.arange(4.0) + 1e-7, "b": torch.tensor(1)}},
    ):
        assert content_digest(other) != digest


@pytest.mark.parametrize("name", ["latest", "mp_rank_00_model_states.pt", "global_step3/x.pt", "rest.pth"])
def test_a_folder_of_deepspeed_shards_names_the_function_that_reads_it(tmp_path, name):
    folder = tmp_path / "checkpoint_3.shards" if name == "rest.pth" else tmp_path / "ckpt_model"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("global_step3")
    for read in (read_checkpoint, newest_checkpoint):
        with pytest.raises(ShardedCheckpointError, match="deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero"):
            read(folder)


def test_a_run_of_shards_alone_does_not_start_anew_silently(tmp_path):
    (tmp_path / "checkpoint_3.shards").mkdir()
    with pytest.raises(ShardedCheckpointError, match=r"checkpoint_3\.shards"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(save(tmp_path, 4).parent) == tmp_path / "checkpoint_4.pth"


# ---------------------------------------------------------------------------------- several writers, full disks


def test_two_saves_at_once_leave_one_whole_file(tmp_path, monkeypatch):
    """Each waits for the other before its file is renamed."""
    path, sync, together = tmp_path / "checkpoint_1.pth", os.fsync, threading.Barrier(2, timeout=10)
    failed = []

    def fsync(handle):
        if not os.path.isdir(f"/proc/self/fd/{handle}"):
            together.wait()
        sync(handle)

    def save_it(value):
        try:
            save_checkpoint(path, {"model": {"a": torch.full((1000,), value)}})
        except OSError as error:
            failed.append(error)

    monkeypatch.setattr(os, "fsync", fsync)
    threads = [threading.Thread(target=save_it, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(read_checkpoint(path)["model"]["a"].unique()) == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _save_on_a_full_disk(path, told):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save_checkpoint(path, {"model": {"a": torch.zeros(100_000)}})
    except BaseException as error:
        told.send((isinstance(error, OSError), str(error)))


def test_a_full_disk_names_the_checkpoint_and_leaves_the_older_one(tmp_path):
    path = tmp_path / "checkpoint_1.pth"
    save_checkpoint(path, {"model": {"a": torch.ones(3)}})
    before = path.read_bytes()
    hear, tell = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_save_on_a_full_disk, args=(path, tell))
    child.start()
    child.join()
    was_os_error, said = hear.recv()
    assert was_os_error and str(path) in said, said
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


# ----------------------------------------------------------------------------------------- torn and foreign files


@pytest.mark.parametrize(
    "entries",
    [
        {"iters": "5"},
        {"iters": -5},
        {"iters": True},
        {"model": [1, 2]},
        {"model": {"a": 5}},
        {"optimizer": 5},
        {"optimizer": {"state": {}, "param_groups": [5]}},
        {"config": "model"},
        {"scaler": 1.0},
    ],
)
def test_entries_of_another_kind_are_no_checkpoint(tmp_path, entries):
    torch.save({"model": {}, **entries}, tmp_path / "checkpoint_5.pth")  # without a digest
    with pytest.raises(CorruptCheckpointError, match=f"checkpoint_5.*'{next(iter(entries))}'"):
        read_checkpoint(tmp_path / "checkpoint_5.pth")


def test_what_is_no_file_is_passed_over_and_set_aside(tmp_path, caplog):
    sound = save(tmp_path, 4)
    (tmp_path / "checkpoint_8.pth").mkdir()
    (tmp_path / "checkpoint_9.pth").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "checkpoint_10.pth")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == sound
    assert all(f"checkpoint_{number}.pth" in caplog.text for number in (8, 9, 10))
    (tmp_path / "earlier-2").mkdir()
    assert {path.name for path in set_foreign_aside(tmp_path)} == {f"checkpoint_{number}.pth" for number in (8, 9, 10)}
    assert numbered_checkpoints(tmp_path) == [sound] and len(list((tmp_path / "earlier-3").iterdir())) == 3
    assert set_foreign_aside(tmp_path) == []


def test_the_next_earlier_folder_is_after_all_others(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "earlier-2").mkdir()
    assert set_aside(tmp_path) == tmp_path / "earlier-3"


def test_a_folder_or_a_device_is_no_checkpoint(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "fifo.pth")
    for path in (tmp_path / "folder.pth", tmp_path / "fifo.pth"):
        with pytest.raises(BadFileError, match=path.name):
            read_checkpoint(path)


def test_left_overs_of_killed_saves_are_removed_and_nothing_else(tmp_path):
    for name in (
        f".checkpoint_1.pth.{'a' * 32}.tmp",
        f"result/.metrics_val_1.json.{'0' * 32}.tmp",
        ".mine.tmp",
        "a.tmp",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".mine.tmp", "a.tmp"}
