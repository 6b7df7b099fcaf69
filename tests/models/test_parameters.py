from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lavis_svp.models.parameters import PARTS, optimizer_groups, part_of


def test_groups_hold_every_trainable_parameter_once_at_its_rate(make_model):
    model = make_model(learning_rates={"language": 3e-4})
    groups = optimizer_groups(model, OmegaConf.create({"init_lr": 1e-3, "weight_decay": 0.1}), {"language": 3e-4})
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
        optimizer_groups(make_model(), OmegaConf.create({"init_lr": 1e-3}), {"lm": 1e-4})
