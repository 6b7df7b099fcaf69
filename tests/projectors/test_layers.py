"""The layers that projectors share: attention against PyTorch's own, pooling and centroids against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lavis_svp.projectors.layers import attend, centroids, exact_total, one_hot, pool, pooling_weights, raster_order


def test_equals_scaled_dot_product_attention_and_tells_where_it_looked():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    allowed = torch.tensor([[True, True, False, True, False], [True] * 5])
    seen, weights = attend(queries, keys, values, allowed, heads=2)
    q, k, v = (x.view(2, -1, 2, 4).transpose(1, 2) for x in (queries, keys, values))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None, None])
    torch.testing.assert_close(seen, expected.transpose(1, 2).reshape(2, 3, 8))
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 3))
    assert weights[0, :, [2, 4]].eq(0).all()
    one_head, share = attend(queries, keys, values, allowed, heads=1)
    torch.testing.assert_close(share @ values, one_head)


def test_nothing_allowed_counts_evenly():
    seen, weights = attend(
        torch.randn(1, 2, 4), torch.randn(1, 3, 4), torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool), 2
    )
    torch.testing.assert_close(weights, torch.full((1, 2, 3), 1 / 3))
    torch.testing.assert_close(seen, torch.ones(1, 2, 4))


def test_softmax_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(1, 2, 4), 8 * torch.randn(1, 50, 4), torch.randn(1, 50, 4)
    allowed = torch.ones(1, 50, dtype=torch.bool)
    exact = attend(queries, keys, values, allowed, 2)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(queries, keys, values, allowed, 2)[0], exact)


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


def test_centroids_are_the_mean_of_patch_centres():
    rows, columns = torch.arange(6)[None] // 3, torch.arange(6)[None] % 3
    weights = torch.tensor([[[0, 0, 0, 0, 0, 1.0], [0.5, 0.5, 0, 0, 0, 0]]])
    assert centroids(weights, rows, columns)[0].tolist() == [[1.5, 2.5], [0.5, 1.0]]


def shares(seed, scale=1.0):
    """Area shares as they come: many zeros, many ones, some tiny."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(2, 5, 48, generator=draw)
    weights = torch.where(weights < 0.4, 0.0, torch.where(weights > 0.7, 1.0, weights)) * scale
    weights[0, 0] *= 1e-4
    return weights


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), scale=st.sampled_from([1.0, 1e-12, 1e-30, 3e8]))
def test_exact_sums_are_those_of_float64_and_padding_does_not_change_them(seed, scale):
    weights = shares(seed, scale)
    total = exact_total(weights)
    assert torch.equal(total, weights.double().sum(2, keepdim=True).float())
    padded = torch.cat([weights, torch.zeros(2, 5, 83)], dim=2)
    assert torch.equal(exact_total(padded), total) and torch.equal(exact_total(weights.flip(2)), total)


def slow_centroids(means, rows, columns):
    places = torch.stack([rows, columns], dim=2).double() + 0.5
    return (means.double() @ places).round(decimals=3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), width=st.sampled_from([6, 8, 16]))
def test_places_and_order_are_those_of_float64(seed, width):
    means = pooling_weights(shares(seed), torch.ones(2, 48, dtype=torch.bool))
    rows, columns = torch.arange(48).expand(2, -1) // width, torch.arange(48).expand(2, -1) % width
    places = slow_centroids(means, rows, columns)
    assert torch.equal(centroids(means, rows, columns), places.float())
    valid = torch.tensor([[True, True, False, True, True], [True] * 5])
    order = raster_order(means, valid, rows, columns)
    for b in range(2):
        keys = [(not valid[b, s], places[b, s, 0].floor().item(), places[b, s, 1].item(), s) for s in range(5)]
        assert order[b].tolist() == [key[3] for key in sorted(keys)]


def test_halves_of_a_thousandth_go_to_the_even_one():
    means = torch.tensor([[[1 / 16, 15 / 16], [3 / 16, 13 / 16]]])  # columns 1.4375 and 1.3125
    rows, columns = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 1]])
    assert centroids(means, rows, columns)[0, :, 1].tolist() == pytest.approx([1.438, 1.312], abs=1e-6)


def test_one_hot_is_pytorchs():
    index = torch.tensor([[0, 3], [2, 1]])
    assert torch.equal(one_hot(index, 4), F.one_hot(index, 4).float())
