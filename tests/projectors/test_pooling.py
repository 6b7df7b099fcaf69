"""Pooling against loops."""

import pytest
import torch

from lavis_svp.projectors.pooling import pool, pooling_weights, with_global, with_whole_image
from lavis_svp.projectors.structures import Superpixels


def test_pool_equals_slow_weighted_mean():
    torch.manual_seed(0)
    weights, patches = torch.rand(2, 3, 6), torch.randn(2, 6, 5)
    patch_valid = torch.ones(2, 6, dtype=torch.bool)
    result = pool(pooling_weights(weights, patch_valid), patches)
    for b in range(2):
        for s in range(3):
            total = sum(weights[b, s, n] * patches[b, n] for n in range(6))
            assert torch.allclose(result[b, s], total / sum(weights[b, s]), atol=1e-6)


def test_tiny_superpixel_counts_fully_and_empty_one_means_the_image():
    weights = torch.zeros(1, 2, 4)
    weights[0, 0, 2] = 1e-12
    patch_valid = torch.tensor([[True, True, True, False]])
    means = pooling_weights(weights, patch_valid)
    assert means[0, 0].tolist() == [0, 0, 1, 0]
    assert torch.allclose(means[0, 1], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


def test_pool_stays_in_float32_under_autocast():
    weights = torch.full((1, 1, 4096), 1 / 4096)
    patches = torch.randn(1, 4096, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(pool(weights, patches), patches.mean(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("slots", [0, 2])
def test_image_without_superpixels_gets_one(slots):
    empty = Superpixels(torch.zeros(1, slots, 4), torch.zeros(1, slots, 3, 3), torch.zeros(1, slots, dtype=torch.bool))
    filled, whole = with_whole_image(empty, torch.tensor([[True, True, False, True]]))
    assert whole.tolist() == [True] and filled.valid.sum() == 1
    assert filled.weights[0, 0].tolist() == [1, 1, 0, 1] and filled.masks[0, 0].eq(1).all()
    assert empty.weights.eq(0).all()  # the input is as it was


@pytest.mark.parametrize("slots", [0, 2])
def test_a_global_superpixel_stands_first(slots):
    own = Superpixels(torch.rand(1, slots, 4), torch.rand(1, slots, 3, 3), torch.ones(1, slots, dtype=torch.bool))
    filled = with_global(own)
    assert filled.weights[0, 0].eq(1).all() and filled.masks[0, 0].eq(1).all() and filled.valid.all()
    assert torch.equal(filled.weights[:, 1:], own.weights) and torch.equal(filled.masks[:, 1:], own.masks)
