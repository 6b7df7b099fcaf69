"""The hooks change what they say and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lavis_svp.probes.disturb import TOKENS, Disturbance, collect, disturbed, targets_of

_spec = importlib.util.spec_from_file_location(
    "projector_checks", Path(__file__).parents[1] / "projectors/projector_checks.py"
)
_checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_checks)
batch_for, make_projector = _checks.batch_for, _checks.make_projector

SIZES = {"sspe_width": 16, "mask_size": 8}


@pytest.fixture
def case():
    projector = make_projector("svp", **SIZES).eval()
    inputs = batch_for(projector)
    bank = collect(projector, (projector(*inputs) for _ in range(2)))
    return projector, inputs, bank


def heads_output(projector, inputs):
    """What each head of SSPE hands on, and the visual tokens."""
    found = {}
    handles = [
        getattr(projector, name).register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
        for name in ("sspe_to_vision", "sspe_to_llm")
    ]
    found["visual"] = projector(*inputs)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_average_gives_every_superpixel_the_mean(case):
    projector, inputs, bank = case
    with disturbed(projector, Disturbance("sspe", "average"), bank):
        found = heads_output(projector, inputs)
    for name in ("sspe_to_vision", "sspe_to_llm"):
        for row, count in zip(found[name], found["visual"].valid.sum(1).tolist(), strict=True):
            torch.testing.assert_close(row[:count], bank.mean(name).expand(count, -1))


@torch.no_grad()
@pytest.mark.parametrize("target", ["sspe", "sspe_ssa", "sspe_tokens"])
def test_zero_is_a_model_with_zeroed_heads(case, target):
    projector, inputs, bank = case
    with disturbed(projector, Disturbance(target, "zero"), bank):
        tokens = projector(*inputs).tokens
    for name in {"sspe": ("sspe_to_vision", "sspe_to_llm"), "sspe_ssa": ("sspe_to_vision",)}.get(
        target, ("sspe_to_llm",)
    ):
        for parameter in getattr(projector, name).parameters():
            parameter.zero_()
    torch.testing.assert_close(tokens, projector(*inputs).tokens)


@torch.no_grad()
def test_nothing_remains_afterwards_also_after_an_error(case):
    projector, inputs, bank = case
    before = projector(*inputs).tokens
    for target in targets_of(projector):
        with pytest.raises(RuntimeError), disturbed(projector, Disturbance(target, "swap"), bank):
            assert not torch.equal(projector(*inputs).tokens, before)
            raise RuntimeError
    assert torch.equal(projector(*inputs).tokens, before)
    assert not projector._forward_hooks and not projector._forward_pre_hooks


@torch.no_grad()
def test_shuffle_permutes_the_same_way_for_both_heads_and_depends_on_the_seed_alone(case):
    projector, inputs, bank = case
    plain = heads_output(projector, inputs)

    def shuffled(seed):
        with disturbed(projector, Disturbance("sspe", "shuffle", seed), bank):
            return heads_output(projector, inputs)

    first, again, other = shuffled(0), shuffled(0), shuffled(1)
    assert torch.equal(first["visual"].tokens, again["visual"].tokens)
    assert not torch.equal(first["visual"].tokens, other["visual"].tokens)
    for image, count in enumerate(plain["visual"].valid.sum(1).tolist()):
        sources = []
        for name in ("sspe_to_vision", "sspe_to_llm"):
            same = torch.cdist(first[name][image, :count], plain[name][image, :count])
            sources.append(same.argmin(1).tolist())
            assert same.min(1).values.max() == 0
        assert sources[0] == sources[1] and sorted(sources[0]) == list(range(count))


@torch.no_grad()
def test_swap_takes_the_vectors_of_one_image_of_the_bank(case):
    projector, inputs, bank = case
    with disturbed(projector, Disturbance("sspe_tokens", "swap"), bank):
        found = heads_output(projector, inputs)["sspe_to_llm"]
    known = [{tuple(row.tolist()) for row in rows} for rows in bank.images["sspe_to_llm"]]
    for row, count in zip(found, projector(*inputs).valid.sum(1).tolist(), strict=True):
        assert any({tuple(one.tolist()) for one in row[:count]} <= rows for rows in known)


@torch.no_grad()
def test_reordered_tokens_keep_their_regions_and_shuffled_ones_do_not(case):
    projector, inputs, bank = case
    plain = projector(*inputs)
    with disturbed(projector, Disturbance(TOKENS, "reorder"), bank):
        moved = projector(*inputs)
    with disturbed(projector, Disturbance(TOKENS, "shuffle"), bank):
        shuffled = projector(*inputs)
    assert torch.equal(shuffled.order, plain.order) and not torch.equal(moved.order, plain.order)
    for image, count in enumerate(plain.valid.sum(1).tolist()):
        for token in range(count):
            place = plain.order[image].tolist().index(int(moved.order[image, token]))
            assert torch.equal(moved.tokens[image, token], plain.tokens[image, place])
            assert torch.equal(moved.assignment[image, token], plain.assignment[image, place])


def test_a_projector_without_sspe_has_its_tokens_only():
    projector = make_projector("mlp")
    assert targets_of(projector) == [TOKENS]
    with pytest.raises(ValueError, match="no SSPE"), disturbed(projector, Disturbance("sspe", "zero"), None):
        pass


def test_impossible_disturbances_are_refused():
    with pytest.raises(KeyError, match="averaged"):
        Disturbance("sspe", "averaged")
    with pytest.raises(ValueError, match="reorder"):
        Disturbance("sspe", "reorder")
