"""Checkpoints: LAVIS's runner writes them, LAVIS's names are kept, BLIP-2's own are a start."""

from __future__ import annotations

import logging

import pytest
import torch

from lavis_svp.common.checkpoints import WrongCheckpointError


def saved_by_lavis(model, folder):
    """What ``RunnerBase._save_checkpoint`` writes."""
    from types import SimpleNamespace

    from lavis.runners.runner_base import RunnerBase

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    runner = SimpleNamespace(
        unwrap_dist_model=lambda m: m, model=model, optimizer=optimizer, scaler=None, output_dir=str(folder),
        config=SimpleNamespace(to_dict=dict),
    )  # fmt: skip
    RunnerBase._save_checkpoint(runner, 0)
    return folder / "checkpoint_0.pth"


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_round_trip_through_laviss_file(make, kind, samples, tmp_path):
    trained = make(kind)
    with torch.no_grad():
        for parameter in (p for p in trained.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = saved_by_lavis(trained, tmp_path)
    names = set(torch.load(path, weights_only=True)["model"])
    own = {name for name in trained.state_dict() if name.startswith((f"{kind}_proj.", "ln_vision."))}
    tied = {name for name in trained.state_dict() if name not in dict(trained.named_parameters())}
    assert own and names == own | tied, "LAVIS also writes second names of shared weights, as for its own BLIP-2"
    fresh = make(kind)
    assert not torch.equal(fresh.visual_tokens(samples).tokens, trained.visual_tokens(samples).tokens)
    loaded = make(kind, load_finetuned=True, finetuned=str(path))
    assert torch.equal(loaded.visual_tokens(samples).tokens, trained.visual_tokens(samples).tokens)
    assert loaded.generate(samples, num_beams=2, max_length=5) == trained.generate(samples, num_beams=2, max_length=5)
    with pytest.raises(WrongCheckpointError, match=f"{kind}_proj"):
        make(kind, projector={"name": "mlp"}, load_finetuned=True, finetuned=str(path))


def test_a_blip2_checkpoint_gives_the_norm_and_its_qformer_is_left_out(make, tmp_path, caplog):
    state = {
        "Qformer.bert.embeddings.LayerNorm.weight": torch.ones(8),
        "query_tokens": torch.zeros(1, 32, 8),
        "opt_proj.weight": torch.zeros(32, 8),
        "opt_proj.bias": torch.zeros(32),
        "ln_vision.weight": torch.full((24,), 3.0),
        "ln_vision.bias": torch.full((24,), 2.0),
        "temp": torch.tensor(0.07),
    }
    path = tmp_path / "blip2.pth"
    torch.save({"model": state}, path)
    with caplog.at_level(logging.INFO):
        model = make("opt", load_pretrained=True, pretrained=str(path))
    assert (model.ln_vision.weight == 3).all() and (model.ln_vision.bias == 2).all()
    assert "Left out, unknown: temp" in caplog.text and "opt_proj.weight" in caplog.text
    torch.save({"model": {"ln_vision.weight": torch.ones(7)}}, path)
    with pytest.raises(WrongCheckpointError, match="another shape: ln_vision.weight"):
        make("opt", load_pretrained=True, pretrained=str(path))
    torch.save({"model": {"query_tokens": torch.zeros(1)}}, path)
    with pytest.raises(WrongCheckpointError, match="nothing that this model has"):
        make("opt", load_pretrained=True, pretrained=str(path))


def test_a_flag_without_a_path(make):
    with pytest.raises(ValueError, match="model.load_finetuned is True, but model.finetuned names no"):
        make("opt", load_finetuned=True)
