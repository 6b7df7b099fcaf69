"""A checkpoint as the small file of the package: what is in it, what it says of itself, what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lavis_svp.cli.export import main
from lavis_svp.common.checkpoints import WrongCheckpointError, read_metadata, save_checkpoint
from lavis_svp.export import shipped
from lavis_svp.zoo.store import sha256_of

POINTER = {
    "seg_prompt": {"state_norm": "batch", "pointer": True},
    "auxiliary_losses": {"word_alignment": 1.0},
    "visual_tokens": {"norm": True},
}
COMMAND = "python -m lavis_svp.train --cfg-path project.yaml"


@pytest.fixture
def run(make_model, tmp_path, monkeypatch):
    """The folder of a training of a tiny model: a checkpoint of some steps, and the summary at its end."""
    model = make_model(**POINTER)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.readout.named_buffers():
            if name.endswith("running_var"):
                buffer.add_(torch.rand_like(buffer))
    section = json.loads(json.dumps(dataclasses.asdict(model.options)))
    config = {"model": {"arch": "svp_ris", "model_type": "tiny", **section}, "run": {"seed": 5}}
    folder = tmp_path / "run"
    (folder / "result").mkdir(parents=True)
    save_checkpoint(folder / "checkpoint_7.pth", {"model": model.checkpoint_state(), "config": config, "iters": 7})
    (folder / "result/test_1.summary.json").write_text(json.dumps({"run": {"command": COMMAND}}))
    parts = [
        SimpleNamespace(name=name, source="PyPI tiny==1", licence="MIT", notice="Random.")
        for name in (model.options.language.name, model.options.sam.name, model.options.vision_encoder.name)
    ]
    monkeypatch.setattr("lavis_svp.zoo.list_weights", lambda: parts)
    return SimpleNamespace(folder=folder, model=model.eval(), section=config["model"], out=tmp_path / "w.safetensors")


def test_the_file_holds_what_the_zoo_does_not_and_says_what_it_is(run, capsys):
    main(["shipped", str(run.folder), str(run.out)])
    state, expected = load_file(run.out), run.model.checkpoint_state()
    assert state.keys() == expected.keys() and not any(name.startswith("frozen") for name in state)
    for name, tensor in state.items():
        matrix = tensor.is_floating_point() and tensor.ndim >= 2
        assert tensor.dtype == (torch.bfloat16 if matrix else expected[name].dtype), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert state["readout.norm.running_var"].dtype == torch.float32
    assert state["readout.norm.num_batches_tracked"].dtype == torch.int64
    said = read_metadata(run.out)
    assert (said["steps"], said["seed"], said["command"]) == ("7", "5", COMMAND) and said["date"]
    assert json.loads(said["model"])["projector"]["name"] == "svp"
    assert [entry["licence"] for entry in json.loads(said["origin"])] == ["MIT"] * 3
    record = json.loads(run.out.with_suffix(".json").read_text())
    assert record["sha256"] == sha256_of(run.out) and record["size"] == run.out.stat().st_size
    assert record["model"] == json.loads(said["model"]) and record["steps"] == "7"
    assert "answers that changed 0" in capsys.readouterr().out
    assert sorted(path.name for path in run.out.parent.glob("*w*")) == ["w.json", "w.safetensors"]


def test_a_configuration_loads_the_file_and_another_is_refused(run, batch_of_two, caplog):
    from lavis_svp.models.svp_ris import SvpRis

    shipped.ship(run.folder, run.out)

    def load(**changes):
        section = {**run.section, "load_finetuned": True, "finetuned": str(run.out), **changes}
        return SvpRis.from_config(OmegaConf.create(section)).eval()

    with torch.no_grad():
        before, after = (m.predict_masks(batch_of_two, "teacher_forced") for m in (run.model, load()))
    for a, b in zip(sum(before, []), sum(after, []), strict=True):
        assert abs(a.logits - b.logits).max() < 0.05 * abs(a.logits).max()
    with pytest.raises(WrongCheckpointError, match=r"model.projector.name: 'svp' in training, 'mlp' now"):
        load(projector={"name": "mlp"})
    with caplog.at_level(logging.WARNING):
        load(superpixels={"name": "slic"})
    assert "model.superpixels.name: 'grid' in training, 'slic' now" in caplog.text


@pytest.fixture
def batch_of_two():
    from lavis_svp.export.parity import probe_samples

    return probe_samples(128)


def test_more_than_the_limit_is_refused_with_the_parts(run, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit):
        main(["shipped", str(run.folder), str(run.out)])
    said = capsys.readouterr().err
    assert "limit" in said and "mask_decoder 7." in said and "projector" in said
    assert not run.out.exists()


def test_frozen_weights_are_refused():
    with pytest.raises(ValueError, match=r"frozen\.vision_encoder\.x"):
        shipped.compact({"frozen.vision_encoder.x": torch.zeros(2, 2)})


def test_weights_of_nobody_knows_where_are_refused(run, monkeypatch):
    monkeypatch.setattr("lavis_svp.zoo.list_weights", list)
    with pytest.raises(ValueError, match="made from the zoo's"):
        shipped.ship(run.folder, run.out)


def test_the_command_is_asked_for_where_no_summary_tells_it(run):
    (run.folder / "result/test_1.summary.json").unlink()
    with pytest.raises(ValueError, match="--command"):
        shipped.ship(run.folder, run.out)
    shipped.ship(run.folder, run.out, "python -m by.hand")
    assert read_metadata(run.out)["command"] == "python -m by.hand"
    with pytest.raises(ValueError, match="safetensors"):
        shipped.ship(run.folder, run.out.with_suffix(".pth"), "x")
