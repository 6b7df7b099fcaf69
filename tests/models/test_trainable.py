from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lavis_svp.models.patterns import is_pattern, matches
from lavis_svp.models.trainable import chosen, train_only

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
    assert chosen(NAMES, patterns) == expected


@given(st.lists(st.sampled_from(["a.*", "!a.*", "!a.x*", "*.weight", "!*", "b*", "*.bias"]), max_size=6))
def test_the_rule_holds_name_by_name(patterns):
    result = chosen(NAMES, patterns)
    for name in NAMES:
        deciding = [p for p in patterns if matches(p.removeprefix("!"), [name])]
        assert (name in result) == bool(deciding and not deciding[-1].startswith("!"))


def test_a_pattern_that_matches_nothing_names_near_ones():
    with pytest.raises(ValueError, match=r"model.trainable.*'projektor\.\*'.*'?projector\.\*"):
        chosen(["projector.head.weight", "readout.mlp.weight"], ["projektor.*"])
    with pytest.raises(ValueError, match=r"'projector'.*projector\.\*"):
        chosen(["projector.head.weight"], ["projector"])
    with pytest.raises(ValueError, match="none of the 5"):
        chosen(NAMES, ["a.*", "!zzz*"])


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
    from lavis_svp.runners.run_options import RunOptions

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
    from lavis_svp.runners.parameter_table import parameter_rows
    from lavis_svp.runners.run_options import RunOptions

    model = make_model(language=LORA, learning_rates={"projector.sspe.*": 1e-4})
    run = OmegaConf.create({"init_lr": 1e-3})
    optimizer = build_optimizer(model, RunOptions(task="t", output_dir="o", init_lr=1e-3), run)
    rows = {row.module: row for row in parameter_rows(model, optimizer.param_groups)}
    assert {"projector.ssa", "projector.head", "readout", "language.transformer (base)"} <= set(rows)
    assert rows["projector.sspe"].rates == [1e-4] and rows["projector.head"].rates == [1e-3]
    assert rows["language.transformer (LoRA)"].trainable == rows["language.transformer (LoRA)"].parameters > 0
    assert rows["frozen.vision_encoder"].trainable == rows["frozen.sam_encoder"].trainable == 0
    assert rows["mask_head.prompt_encoder"].trainable == 0 < rows["mask_head.mask_decoder"].trainable
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())
