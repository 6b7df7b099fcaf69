"""One gapless sequence per row."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.projectors import VisualTokens


@given(
    counts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4),
    text_padding=st.sampled_from(["left", "right"]),
    padding=st.sampled_from(["left", "right"]),
)
def test_rows_are_what_a_loop_concatenates(counts, text_padding, padding):
    from lavis_svp.hosts.blip2.base import IGNORED, join

    most, widest, dim = max(c for c, _ in counts), max(w for _, w in counts), 3
    tokens, valid = torch.zeros(len(counts), most, dim), torch.zeros(len(counts), most, dtype=torch.bool)
    text = torch.randn(len(counts), widest, dim)
    mask, labels = torch.zeros(len(counts), widest, dtype=torch.long), torch.arange(widest).repeat(len(counts), 1)
    expected = []
    for row, (count, width) in enumerate(counts):
        tokens[row, :count], valid[row, :count] = torch.randn(count, dim), True
        words = slice(widest - width, widest) if text_padding == "left" else slice(0, width)
        mask[row, words] = 1
        expected.append(
            (torch.cat([tokens[row, :count], text[row, words]]), [IGNORED] * count + labels[row, words].tolist())
        )
    joined = join(VisualTokens(tokens, valid), text, mask, labels, padding)
    length = max(len(embeddings) for embeddings, _ in expected)
    assert joined.embeddings.shape == (len(counts), length, dim)
    for row, (embeddings, row_labels) in enumerate(expected):
        real = slice(length - len(embeddings), length) if padding == "left" else slice(0, len(embeddings))
        assert torch.equal(joined.embeddings[row, real], embeddings)
        assert joined.mask[row, real].all() and joined.mask[row].sum() == len(embeddings)
        assert joined.labels[row, real].tolist() == row_labels
        assert (joined.labels[row] != IGNORED).sum() <= counts[row][1]
        assert joined.embeddings[row][joined.mask[row] == 0].abs().sum() == 0


def test_the_language_model_decides_the_dtype():
    from lavis_svp.hosts.blip2.base import join

    visual = VisualTokens(torch.randn(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    joined = join(visual, torch.randn(1, 2, 3, dtype=torch.float16), torch.ones(1, 2))
    assert joined.embeddings.dtype == torch.float16 and joined.labels is None
