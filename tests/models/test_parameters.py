from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from lavis_svp.models.parameters import PARTS, checkpoint_state, optimizer_groups, parameter_row, part_of

RUN = OmegaConf.create({"init_lr": 1e-3, "weight_decay": 0.1})


def rates_by_name(model, rates, run=RUN):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer_groups(model, run, rates) for p in group["params"]}


def test_groups_hold_every_trainable_parameter_once_at_its_rate(make_model):
    model = make_model(learning_rates={"language": 3e-4})
    groups = optimizer_groups(model, RUN, {"language": 3e-4})
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    for group in groups:
        assert group["lr"] == (3e-4 if group["name"] == "language" else 1e-3)
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_every_parameter_belongs_to_a_part(make_model):
    model = make_model()
    named = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert named <= set(PARTS) and "frozen" not in named
    assert {part_of(name) for name, p in model.named_parameters() if not p.requires_grad} >= {"frozen", "mask_decoder"}


def test_a_rate_for_an_unknown_part_is_named(make_model):
    with pytest.raises(ValueError, match="lm"):
        optimizer_groups(make_model(), RUN, {"lm": 1e-4})


def test_a_pattern_goes_before_its_part_and_the_later_pattern_before_the_earlier(make_model):
    model = make_model()
    rates = {"projector.sspe*": 1e-4, "projector": 5e-4, "projector.sspe.queries": "2e-5"}
    found = rates_by_name(model, rates)
    assert found["projector.sspe.queries"] == 2e-5
    assert found["projector.sspe.norm.weight"] == found["projector.sspe_to_llm.weight"] == 1e-4
    assert found["projector.head.0.weight"] == 5e-4 and found["readout.mlp.0.weight"] == 1e-3
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_pattern_for_nothing_or_for_frozen_parameters_is_named(make_model):
    model = make_model(trainable=["projector.*", "!projector.sspe*"])
    with pytest.raises(ValueError, match=r"learning_rates.*'projector.ssa_x.\*'.*projector\.ssa"):
        optimizer_groups(model, RUN, {"projector.ssa_x.*": 1e-4})
    with pytest.raises(ValueError, match=r"projector.sspe.\*.*frozen"):
        optimizer_groups(model, RUN, {"projector.sspe.*": 1e-4})
    optimizer_groups(model, RUN, {"language": 1e-4})  # a part may be frozen: default YAMLs name rates for parts


def test_rates_reach_the_optimizer_and_survive_a_resume(make_model):
    from lavis_svp.runners.optimizer import build_optimizer, scale_learning_rates
    from lavis_svp.runners.run_options import RunOptions

    options = RunOptions(task="t", output_dir="o", init_lr=1e-3)
    rates = {"projector.sspe.*": 1e-4, "mask_decoder": 2e-4}

    def build():
        return build_optimizer(make_model(learning_rates=rates), options, OmegaConf.create({"init_lr": 1e-3}))

    first, second = build(), build()
    scale_learning_rates(first, 0.25)
    second.load_state_dict(first.state_dict())
    scale_learning_rates(second, 0.5)
    now = {group["name"]: group["lr"] for group in second.param_groups}
    assert now["projector.sspe.*"] == pytest.approx(5e-5) and now["mask_decoder"] == pytest.approx(1e-4)
    assert now["projector"] == pytest.approx(5e-4)


def test_a_checkpoint_holds_what_no_named_weights_hold(make_model):
    model = make_model(trainable=["projector.head.*"], readout={"state_norm": "batch"})
    names = set(checkpoint_state(model))
    assert {"projector.sspe.queries", "readout.mlp.0.weight", "language.added_embedding"} <= names  # random, frozen
    assert "readout.norm.running_mean" in names
    assert not any(name.startswith(("frozen.", "language.transformer", "mask_head")) for name in names)
    carried = "language.transformer.norm.weight"
    assert carried in checkpoint_state(model, {carried})
    assert not any(torch.is_tensor(t) and t.requires_grad for t in checkpoint_state(model).values())


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("projector.sspe.blocks.0.cross.query.weight", "projector.sspe"),
        ("language.transformer.layers.0.self_attn.q_proj.base_layer.weight", "language.transformer (base)"),
        ("language.transformer.layers.0.self_attn.q_proj.lora_A.default.weight", "language.transformer (LoRA)"),
        ("language.added_embedding", "language.added_embedding ([SEG])"),
        ("language.embed_tokens.weight", "language.embed_tokens"),
        ("readout.mlp.0.weight", "readout"),
        ("mask_head.mask_decoder.iou_token.weight", "mask_head.mask_decoder"),
        ("frozen.vision_encoder.model.layer.0.weight", "frozen.vision_encoder"),
    ],
)
def test_rows_of_the_table(name, row):
    assert parameter_row(name) == row
