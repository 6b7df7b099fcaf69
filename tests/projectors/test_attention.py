"""Attention against PyTorch's own."""

import torch
from torch.nn import functional as F

from lavis_svp.projectors.attention import attend


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
