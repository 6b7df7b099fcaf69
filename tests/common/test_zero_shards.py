"""Reading DeepSpeed's files: hand-made ones of somebody else's, missing and damaged parts, harmful pickles."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from lavis_svp.common.checkpoint_errors import CorruptCheckpointError
from lavis_svp.common.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint
from lavis_svp.common.shard_folders import REST, describe_files, write_complete
from lavis_svp.common.zero_shards import load_part, read_zero_folder
from lavis_svp.common.zero_state_dict import trained_checkpoint

SHAPES = {"a.weight": torch.Size([3, 5]), "a.bias": torch.Size([3]), "b.weight": torch.Size([1])}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def values():
    """{name: {kind: tensor}}."""
    generator = torch.Generator().manual_seed(0)
    return {name: {kind: torch.randn(shape, generator=generator) for kind in KINDS} for name, shape in SHAPES.items()}


def flat_group(tensors, kind, world):
    """As ZeRO-1 and -2: end to end, padded, cut in equal parts."""
    flat = torch.cat([tensors[name][kind].reshape(-1) for name in SHAPES])
    return list(torch.nn.functional.pad(flat, (0, -len(flat) % world)).chunk(world))


def flat_parameters(tensors, kind, world):
    """As ZeRO-3: every parameter padded and cut."""
    flats = [tensors[name][kind].reshape(-1) for name in SHAPES]
    cut = [torch.nn.functional.pad(flat, (0, -len(flat) % world)).view(world, -1) for flat in flats]
    return [torch.cat([part[rank] for part in cut]) for rank in range(world)]


def make_folder(folder, stage, world, extra=None):
    """A DeepSpeed checkpoint of one group, and what it holds."""
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step7\n")
    tensors = values()
    module = {name: entry["weight"].bfloat16() for name, entry in tensors.items()}
    if stage == 3:
        module = {name: torch.empty(0) for name in module}
    module |= {"a.running": torch.arange(3), "frozen.table": torch.ones(2)}
    head = {"module": module, "param_shapes": [SHAPES], "buffer_names": ["a.running", "frozen.table"]}
    head |= {"global_steps": 7, "shared_params": {"c.weight": "b.weight"}, "extra": extra}
    torch.save(head, tag / f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt")
    cut = flat_parameters if stage == 3 else flat_group
    parts = {kind: cut(tensors, kind, world) for kind in KINDS}
    for rank in range(world):
        entry = {"step": torch.tensor(7.0), **{kind: parts[kind][rank].clone() for kind in KINDS[1:]}}
        base = {"state": {0: entry}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        names = ("fp32_flat_groups", "optimizer_state_dict")
        if stage != 3:
            names = ("single_partition_of_fp32_groups", "base_optimizer_state")
        state = {names[0]: [parts["weight"][rank].clone()], names[1]: base, "partition_count": world}
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tensors


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_folder_of_somebody_else_is_joined(tmp_path, stage, world):
    tensors = make_folder(tmp_path / "ckpt_model", stage, world)
    contents = trained_checkpoint(read_zero_folder(tmp_path / "ckpt_model"))
    assert set(contents["model"]) == {*SHAPES, "a.running", "c.weight"}  # not the frozen module's table
    (group,) = contents["optimizer"]["param_groups"]
    for index, name in zip(group["params"], group["param_names"], strict=True):
        assert torch.equal(contents["model"][name], tensors[name]["weight"])
        entry = contents["optimizer"]["state"][index]
        assert entry["step"] == 7 and all(torch.equal(entry[kind], tensors[name][kind]) for kind in KINDS[1:])
    assert torch.equal(contents["model"]["c.weight"], tensors["b.weight"]["weight"]) and contents["iters"] == 7


def test_without_an_optimizer_part_the_models_own_weights_are_taken(tmp_path):
    for stage in (2, 3):
        tensors = make_folder(tmp_path / str(stage), stage, 2)
        for path in (tmp_path / str(stage)).rglob("*optim_states.pt"):
            path.unlink()
    contents = trained_checkpoint(read_zero_folder(tmp_path / "2"))
    assert "optimizer" not in contents
    assert torch.equal(contents["model"]["a.weight"], tensors["a.weight"]["weight"].bfloat16().float())
    with pytest.raises(FileNotFoundError, match="where ZeRO-3 keeps the weights of 3 parameters"):
        read_zero_folder(tmp_path / "3")


def test_missing_shards_are_named(tmp_path):
    make_folder(tmp_path, 2, 5)
    for rank in (1, 4):
        (tmp_path / f"global_step7/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"5 processes and lacks .*rank_1_mp.*rank_4_mp"):
        read_zero_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a DeepSpeed checkpoint"):
        read_zero_folder(tmp_path.parent / "nowhere")
    (tmp_path / "latest").write_text("../../etc")
    with pytest.raises(FileNotFoundError, match="no folder beside it"):
        read_zero_folder(tmp_path)


def test_shards_of_different_sizes_do_not_fit_together(tmp_path):
    make_folder(tmp_path / "a", 2, 4)
    make_folder(tmp_path / "b", 2, 5)
    name = "global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(CorruptCheckpointError, match="do not fit together"):
        read_zero_folder(tmp_path / "a")


def test_code_in_a_shard_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    make_folder(tmp_path / "folder", 2, 2, extra=Harmful(victim))
    with pytest.raises(CorruptCheckpointError, match="cannot be read safely"):
        read_zero_folder(tmp_path / "folder")
    path = tmp_path / "part.pt"
    torch.save({"optimizer_state_dict": [Harmful(victim)]}, path)
    with pytest.raises(CorruptCheckpointError):
        load_part(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the pickle is harmful indeed"


def make_own(folder, stage=2, world=2):
    """A complete folder as the runner writes it."""
    tensors = make_folder(folder, stage, world)
    group = {"lr": 0.1, "params": [0, 1, 2], "param_names": list(SHAPES)}
    rest = {"model": {}, "names": list(SHAPES), "optimizer": {"state": {}, "param_groups": [group]}}
    save_checkpoint(folder / REST, {**rest, "scaler": None, "config": {}, "iters": 7})
    write_complete(folder, {"files": describe_files(folder)})
    return tensors


@pytest.mark.parametrize("harm", ["flip", "cut", "lose", "unfinished", "rest"])
def test_damage_is_found_and_the_checkpoint_before_it_taken(tmp_path, harm):
    make_own(tmp_path / "checkpoint_6.shards")
    folder = tmp_path / "checkpoint_7.shards"
    tensors = make_own(folder)
    joined = read_checkpoint(folder)
    assert torch.equal(joined["model"]["a.bias"], tensors["a.bias"]["weight"])
    assert newest_checkpoint(tmp_path) == folder
    part = folder / "global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(part.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif harm == "cut":
        part.write_bytes(content[:-10])
    else:
        {"lose": part, "unfinished": folder / "complete.json", "rest": folder / REST}[harm].unlink()
    with pytest.raises(CorruptCheckpointError, match="complete.json" if harm == "unfinished" else "damaged|lacks 1 of"):
        read_checkpoint(folder)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint_6.shards"
