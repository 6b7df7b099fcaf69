"""`c_abstractor`: its block written out, and images that must not see their padding."""

import pytest
import torch
from projector_checks import make_batch, make_projector
from torch.nn import functional as F

from lavis_svp.projectors.baselines.c_abstractor import RegNetBlock, stretched

OPTIONS = {"tokens_h": 3, "tokens_w": 2, "blocks": 2}


def slow_block(block, x):
    """The block for one whole image (H, W, C), its convolution and squeeze as loops."""
    height, width, _ = x.shape
    y = F.silu(block.expand_norm(x @ block.expand.weight.T))
    convolved = torch.zeros_like(y)
    for row in range(height):
        for column in range(width):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= row + i < height and 0 <= column + j < width:
                        convolved[row, column] += block.local.weight[:, 0, i + 1, j + 1] * y[row + i, column + j]
    y = F.silu(block.local_norm(convolved))
    mean = sum(y[row, column] for row in range(height) for column in range(width)) / (height * width)
    gate = torch.sigmoid(block.excite(F.relu(block.squeeze(mean))))
    return F.silu(x + block.reduce_norm((y * gate) @ block.reduce.weight.T))


@torch.no_grad()
def test_the_block_is_that_of_a_loop_over_the_valid_rectangle():
    torch.manual_seed(0)
    block = RegNetBlock(8)
    x = torch.randn(2, 5, 6, 8)
    inside = torch.zeros(2, 5, 6, dtype=torch.bool)
    inside[0, :4, :5], inside[1] = True, True
    result = block(x, inside)
    torch.testing.assert_close(result[0, :4, :5], slow_block(block, x[0, :4, :5]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result[1], slow_block(block, x[1]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("position", [True, False])
def test_tokens_of_a_loop(position):
    projector = make_projector("c_abstractor", **OPTIONS, position=position)
    features, _ = make_batch([projector.grid])
    x = features.patches[0].view(8, 6, -1)[:7]
    if position:
        learned = projector.position.permute(2, 0, 1)[None]
        x = x + F.interpolate(learned, (7, 6), mode="bilinear")[0].permute(1, 2, 0)
    for block in projector.before:
        x = slow_block(block, x)
    x = F.adaptive_avg_pool2d(x.permute(2, 0, 1), (3, 2)).permute(1, 2, 0)
    for block in projector.after:
        x = slow_block(block, x)
    expected = projector.head(x.flatten(0, 1))
    torch.testing.assert_close(projector(features).tokens[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 6), (5, 9), (3, 2), (1, 1)])
def test_positions_are_interpolated(size):
    position = torch.randn(8, 6, 4)
    inside = torch.zeros(1, 9, 9, dtype=torch.bool)
    inside[0, : size[0], : size[1]] = True
    expected = F.interpolate(position.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
    found = stretched(position, inside)[0, : size[0], : size[1]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
