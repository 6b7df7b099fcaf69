"""SSA: its start, its sizes, and the position that patches share; test_reference.py shows that it is exact."""

import pytest
import torch

from lavis_svp.projectors.svp.ssa import SSA, shared_position


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
