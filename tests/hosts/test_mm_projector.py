"""LLaVA's mm_projector.bin: round trips, older names, its own weights in our head, files that are something else."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from lavis_svp.hosts.mm_projector import load_mm_projector, save_mm_projector
from lavis_svp.projectors import build_projector, list_projectors
from lavis_svp.projectors.testing import make_projector


def build(name="svp", llm=24, **options):
    return build_projector(name, vision_dim=32, llm_dim=llm, grid=(4, 4), **options)


def same(one, two):
    return all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
def test_round_trip(tmp_path, prefix):
    path = save_mm_projector(tmp_path / "new" / "mm_projector.bin", projector := build(), prefix)
    assert [file.name for file in path.parent.iterdir()] == ["mm_projector.bin"]
    assert all(key.startswith(f"{prefix}mm_projector.") for key in torch.load(path, weights_only=True))
    other = build()
    assert not same(projector, other)
    assert load_mm_projector(path, other) == [] and same(projector, other)


def test_as_llavas_trainer_writes_and_its_model_reads(tmp_path):
    """Its trainer saves named parameters whose name has mm_projector; its loader cuts the name there."""
    model = nn.ModuleDict({"model": nn.ModuleDict({"mm_projector": build(), "embed_tokens": nn.Embedding(3, 2)})})
    weights = {key: value for key, value in model.named_parameters() if "mm_projector" in key or "embed" in key}
    torch.save(weights, tmp_path / "theirs.bin")
    other = build()
    assert load_mm_projector(tmp_path / "theirs.bin", other) == [] and same(model["model"]["mm_projector"], other)
    ours = torch.load(save_mm_projector(tmp_path / "ours.bin", other), weights_only=True)
    model.load_state_dict(ours, strict=False)
    build().load_state_dict({key.split("mm_projector.")[1]: value for key, value in ours.items()})


@pytest.mark.parametrize("name", list_projectors())
def test_all_of_a_projector_is_in_what_llavas_trainer_writes(name):
    """It writes named parameters only: a buffer that has to be kept would be lost."""
    projector = make_projector(name)
    assert set(projector.state_dict()) == {key for key, _ in projector.named_parameters()}


def test_llavas_mlp_becomes_the_head(tmp_path):
    mlp = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
    path = save_mm_projector(tmp_path / "mm_projector.bin", mlp)
    for name in ("mlp", "mask_pool", "svp"):
        projector = build(name)
        new = load_mm_projector(path, projector)
        assert same(mlp, projector.head)
        assert sorted(new) == sorted(key for key in projector.state_dict() if not key.startswith("head."))
    again = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
    assert load_mm_projector(path, again) == [] and same(mlp, again)


def test_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="No projector at"):
        load_mm_projector(tmp_path / "none.bin", build())
    path = save_mm_projector(tmp_path / "wide.bin", build(llm=48))
    with pytest.raises(ValueError, match=r"other shape: \['head.0.bias \(48,\) for \(24,\)'"):
        load_mm_projector(path, build())
    path = save_mm_projector(tmp_path / "other.bin", build("mask_pool"))
    with pytest.raises(ValueError, match="Missing: .*ssa"):
        load_mm_projector(path, build())
    deep = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
    with pytest.raises(ValueError, match="unexpected: .*4.weight"):
        load_mm_projector(save_mm_projector(tmp_path / "deep.bin", deep), build())
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="mapping of names to tensors"):
        load_mm_projector(tmp_path / "list.bin", build())
    torch.save({"step": torch.zeros(2)}, tmp_path / "nothing.bin")
    with pytest.raises(ValueError, match="Missing"):
        load_mm_projector(tmp_path / "nothing.bin", build())


class Payload:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"mm_projector.0.weight": Payload()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="not a file of tensors"):
        load_mm_projector(tmp_path / "evil.bin", build())
    assert not (tmp_path / "ran").exists()
