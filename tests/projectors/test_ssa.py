"""SSA against a loop over superpixels and heads; the position that patches share with their superpixels."""

import pytest
import torch
from torch.nn import functional as F

from lavis_svp.projectors.ssa import SSA, shared_position


def slow_ssa_block(block, superpixels, patches, valid, sspe, position):
    """One superpixel, one head at a time, over the valid patches only."""
    out = torch.empty_like(superpixels)
    for b in range(superpixels.shape[0]):
        seen = patches[b, valid[b]]
        keys = block.key(block.key_norm(seen) + position[b, valid[b]])
        values = block.value(seen)
        width = keys.shape[1] // block.heads
        for s in range(superpixels.shape[1]):
            query = block.query(block.query_norm(superpixels[b, s]) + sspe[b, s])
            parts = []
            for head in range(block.heads):
                part = slice(head * width, (head + 1) * width)
                attention = (keys[:, part] @ query[part] / width**0.5).softmax(dim=0)
                parts.append(attention @ values[:, part])
            x = superpixels[b, s] + block.out(torch.cat(parts))
            out[b, s] = x + block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(x))))
    return out


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    valid = torch.rand(2, 7) < 0.7
    valid[:, 0] = True
    return {
        "superpixels": torch.randn(2, 3, 12),
        "patches": torch.randn(2, 7, 12),
        "valid": valid,
        "sspe": torch.randn(2, 3, 12),
        "position": torch.randn(2, 7, 12),
    }


def test_ssa_equals_slow_loop(inputs):
    ssa = SSA(12, heads=3, blocks=2)
    for parameter in ssa.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = inputs["superpixels"]
    for block in ssa.blocks:
        expected = slow_ssa_block(block, **{**inputs, "superpixels": expected})
    assert torch.allclose(ssa(**inputs), expected, atol=1e-5)


def test_ssa_starts_as_the_identity(inputs):
    assert torch.equal(SSA(12, heads=2)(**inputs), inputs["superpixels"])


def test_image_without_valid_patch_stays_finite(inputs):
    ssa = SSA(12, heads=2)
    torch.nn.init.normal_(ssa.blocks[0].out.weight)
    assert ssa(**{**inputs, "valid": torch.zeros(2, 7, dtype=torch.bool)}).isfinite().all()


def test_heads_follow_the_width_unless_given():
    assert SSA(384).blocks[0].heads == 6 and SSA(1024).blocks[0].heads == 16
    with pytest.raises(ValueError, match="ssa_heads"):
        SSA(1024, heads=6)


def test_shared_position_by_hand():
    sspe = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])
    # in none; wholly in the first; a quarter in each; wholly in both (they overlap)
    weights = torch.tensor([[[0.0, 1.0, 0.25, 1.0], [0.0, 0.0, 0.25, 1.0]]])
    expected = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.25, 1.0], [0.5, 2.0]]])
    assert torch.allclose(shared_position(weights, sspe), expected)
