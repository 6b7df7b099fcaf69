from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from lavis_svp.models.param_groups import (
    PARTS,
    checkpoint_state,
    is_pattern,
    match_trainable,
    matches,
    optimizer_groups,
    parameter_row,
    part_of,
    train_only,
)

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
    from lavis_svp.runners.options import RunOptions

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
    model = make_model(trainable=["projector.head.*"], seg_prompt={"state_norm": "batch"})
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
        ("readout.mlp.0.weight", "seg_prompt"),
        ("aids.word_alignment.weight", "auxiliary_losses"),
        ("mask_head.mask_decoder.iou_token.weight", "mask_head.mask_decoder"),
        ("frozen.vision_encoder.model.layer.0.weight", "frozen.vision_encoder"),
    ],
)
def test_rows_of_the_table(name, row):
    assert parameter_row(name) == row


LORA = {"tuning": "lora", "train_embeddings": "added", "lora": {"r": 2, "alpha": 4}}
NAMES = ["a.x.weight", "a.x.bias", "a.y.weight", "b.weight", "b"]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["a.*"], {"a.x.weight", "a.x.bias", "a.y.weight"}),
        (["a.*", "!a.x*"], {"a.y.weight"}),
        (["a.*", "!a.x*", "*.bias"], {"a.y.weight", "a.x.bias"}),
        (["!a.*", "*.weight"], {"a.x.weight", "a.y.weight", "b.weight"}),
        (["b"], {"b"}),
        (["a.[yz].*"], {"a.y.weight"}),
    ],
)
def test_the_last_match_decides(patterns, expected):
    assert match_trainable(NAMES, patterns) == expected


@given(st.lists(st.sampled_from(["a.*", "!a.*", "!a.x*", "*.weight", "!*", "b*", "*.bias"]), max_size=6))
def test_the_rule_holds_name_by_name(patterns):
    result = match_trainable(NAMES, patterns)
    for name in NAMES:
        deciding = [p for p in patterns if matches(p.removeprefix("!"), [name])]
        assert (name in result) == bool(deciding and not deciding[-1].startswith("!"))


def test_a_pattern_that_matches_nothing_names_near_ones():
    with pytest.raises(ValueError, match=r"model.trainable.*'projektor\.\*'.*'?projector\.\*"):
        match_trainable(["projector.head.weight", "readout.mlp.weight"], ["projektor.*"])
    with pytest.raises(ValueError, match=r"'projector'.*projector\.\*"):
        match_trainable(["projector.head.weight"], ["projector"])
    with pytest.raises(ValueError, match="none of the 5"):
        match_trainable(NAMES, ["a.*", "!zzz*"])


def test_what_is_meant_as_a_pattern():
    assert [is_pattern(key) for key in ("projector", "projector.*", "mask*", "language.output.weight")] == [
        False, True, True, True,
    ]  # fmt: skip


def test_patterns_say_it_all(make_model):
    model = make_model(
        language=LORA,
        sam={"train_decoder": False},
        trainable=["projector.*", "!projector.sspe*", "language.transformer.*lora_*", "language.added_*"],
    )
    names = trained(model)
    assert any(".lora_A." in name for name in names) and "language.added_embedding" in names
    assert {name.split(".")[1] for name in names if name.startswith("projector.")} == {"head", "ssa"}
    assert not any(name.startswith(("readout.", "mask_head.", "language.embed")) for name in names)


def test_without_patterns_the_options_say_it(make_model):
    assert trained(make_model(trainable=None)) == trained(make_model())


def test_gradients_reach_the_projector_through_a_frozen_language_model(make_model, batch):
    model = make_model(language={"gradient_checkpointing": True}, trainable=["projector.*"])
    random.seed(0)
    model(batch)["loss_ce"].backward()
    assert all(p.grad is None for p in model.language.parameters())
    assert model.projector.head[0].weight.grad.abs().sum() > 0


def test_only_what_is_chosen_reaches_the_optimizer(make_model):
    from omegaconf import OmegaConf

    from lavis_svp.runners.optimizer import build_optimizer
    from lavis_svp.runners.options import RunOptions

    model = make_model(trainable=["projector.head.*", "readout.*"])
    run = RunOptions(task="t", output_dir="o", init_lr=0.1)
    optimizer = build_optimizer(model, run, OmegaConf.create({"init_lr": 0.1}))
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == trained(model) and {name.split(".")[0] for name in names} == {"projector", "readout"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainable": ["projector.*", "*"]}, "frozen encoders.*frozen\\."),
        ({"trainable": ["projector.*", "!*"]}, "nothing to train"),
        ({"trainable": []}, "nothing to train"),
        ({"trainable": ["projector.*"], "language": LORA}, "adapter matrices.*lora_"),
        ({"trainable": ["projector.sppe.*"]}, r"projector\.sspe\.\*"),
        ({"trainable": "projector.*"}, "list of patterns"),
    ],
)
def test_wrong_choices_are_named(make_model, sections, message):
    with pytest.raises(ValueError, match=message):
        make_model(**sections)


def test_everything_but_the_frozen_half(make_model):
    assert trained(make_model(trainable=["*", "!frozen.*"])) > trained(make_model())


def test_quantised_weights_cannot_train():
    model = nn.Module()
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.scale = nn.Parameter(torch.ones(2))
    train_only(model, ["scale"])
    assert trained(model) == {"scale"} and not model.packed.requires_grad
    with pytest.raises(ValueError, match="quantised.*packed"):
        train_only(model, ["*"])


def test_the_start_up_tables_rows(make_model):
    from omegaconf import OmegaConf

    from lavis_svp.runners.optimizer import build_optimizer
    from lavis_svp.runners.options import RunOptions
    from lavis_svp.runners.training_log import parameter_rows

    model = make_model(language=LORA, learning_rates={"projector.sspe.*": 1e-4})
    run = OmegaConf.create({"init_lr": 1e-3})
    optimizer = build_optimizer(model, RunOptions(task="t", output_dir="o", init_lr=1e-3), run)
    rows = {row.module: row for row in parameter_rows(model, optimizer.param_groups)}
    assert {"projector.ssa", "projector.head", "seg_prompt", "language.transformer (base)"} <= set(rows)
    assert rows["projector.sspe"].rates == [1e-4] and rows["projector.head"].rates == [1e-3]
    assert rows["language.transformer (LoRA)"].trainable == rows["language.transformer (LoRA)"].parameters > 0
    assert rows["frozen.vision_encoder"].trainable == rows["frozen.sam_encoder"].trainable == 0
    assert rows["mask_head.prompt_encoder"].trainable == 0 < rows["mask_head.mask_decoder"].trainable
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())
