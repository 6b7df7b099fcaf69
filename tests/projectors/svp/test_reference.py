"""The fast SSPE and SSA against the plain ones, outputs and gradients, over their options and over sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lavis_svp.projectors.svp.reference import attention, plain_ssa, plain_sspe
from lavis_svp.projectors.svp.ssa import SSA, shared_position
from lavis_svp.projectors.svp.sspe import SSPE

sizes = st.integers(1, 6)


def randomised(module, seed):
    """Give every parameter a random value, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def assert_same(fast, plain, inputs):
    """Compare two results and the gradients that a random function of them has."""
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad((result * weights).sum(), inputs) for result in (fast, plain)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def soft_masks(seed, *shape):
    """Soft masks with empty cells; the first superpixel of the first image is empty."""
    masks = (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.4).clamp_min(0)
    masks[0, 0] = 0
    return masks


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("queries", "heads", "width", "ffn_ratio"), [(4, 4, 16, 2), (1, 1, 8, 1), (3, 2, 12, 3)])
def test_sspe_equals_the_plain_one(blocks, queries, heads, width, ffn_ratio):
    sspe = SSPE(10, width=width, num_queries=queries, blocks=blocks, heads=heads, ffn_ratio=ffn_ratio)
    randomised(sspe, seed=blocks)
    masks = soft_masks(0, 2, 5, 6, 9)
    assert_same(sspe(masks), plain_sspe(sspe, masks), list(sspe.parameters()))


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 999))
def test_sspe_equals_the_plain_one_at_any_size(batch, count, height, width, seed):
    sspe = randomised(SSPE(6, width=8, heads=2, blocks=2), seed)
    masks = soft_masks(seed, batch, count, height, width)
    assert_same(sspe(masks), plain_sspe(sspe, masks), list(sspe.parameters()))


def ssa_inputs(seed, batch, count, patches, width):
    """Superpixels, patches, valid patches, SSPE and area shares, some of which overlap."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"coarse": (count, width), "patches": (patches, width), "sspe": (count, width)}
    made = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
    valid = torch.rand(batch, patches, generator=generator) < 0.7
    valid[:, 0] = True
    return {**made, "valid": valid, "weights": torch.rand(batch, count, patches, generator=generator)}


def compare_ssa(ssa, coarse, patches, valid, sspe, weights):
    """Compare fast and plain on the same inputs, which get gradients as the parameters do."""
    leaves = [x.requires_grad_() for x in (coarse, patches, sspe) if x is not None]
    position = None if weights is None else shared_position(weights, sspe)
    fast = ssa(coarse, patches, valid, sspe, position)
    assert_same(fast, plain_ssa(ssa, coarse, patches, valid, sspe, weights), [*ssa.parameters(), *leaves])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("off", [(), ("weights",), ("weights", "sspe")], ids=["full", "no_shared_sspe", "no_sspe"])
def test_ssa_equals_the_plain_one(heads, blocks, off):
    ssa = randomised(SSA(12, heads=heads, blocks=blocks), seed=blocks)
    inputs = ssa_inputs(1, 2, 3, 7, 12)
    compare_ssa(ssa, **{name: None if name in off else value for name, value in inputs.items()})


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 999))
def test_ssa_equals_the_plain_one_at_any_size(batch, count, patches, seed):
    ssa = randomised(SSA(8, heads=2), seed)
    compare_ssa(ssa, **ssa_inputs(seed, batch, count, patches, 8))


def test_plain_attention_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, 6, generator=generator) for length in (2, 5, 5))
    bias = torch.randn(5, generator=generator)
    expected = torch.zeros(2, 6)
    for head in (slice(0, 3), slice(3, 6)):
        for row in range(2):
            logits = torch.stack([q[row, head] @ k[key, head] / 3**0.5 + bias[key] for key in range(5)])
            expected[row, head] = sum(w * x for w, x in zip(F.softmax(logits, dim=0), v[:, head], strict=True))
    torch.testing.assert_close(attention(q, k, v, bias, heads=2), expected)
