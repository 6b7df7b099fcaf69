"""The layers that projectors share: attention against PyTorch's own, pooling and centroids against loops."""

import torch
from torch.nn import functional as F

from lavis_svp.projectors.layers import attend, centroids, pool, pooling_weights


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
