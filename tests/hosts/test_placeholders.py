"""Placeholders: as many as tokens, each image's tokens at its own, and errors that say both numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.hosts.placeholders import (
    expand_placeholders,
    images_per_row,
    repeated_indices,
    replace_placeholders,
)

rows_of_counts = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4)


@settings(deadline=None)
@given(rows=rows_of_counts)
def test_expanding_then_placing_brings_every_token_to_its_place(rows):
    texts = ["a" + "b".join("#" for _ in row) + "c" for row in rows]
    counts = [count for row in rows for count in row]
    expanded = expand_placeholders(texts, "#", counts)
    length = max(map(len, expanded))
    is_visual = torch.tensor([[letter == "#" for letter in text.ljust(length)] for text in expanded])
    packed = torch.arange(1.0, sum(counts) + 1)[:, None].expand(-1, 2)
    embeddings = torch.zeros(len(rows), length, 2)
    placed = replace_placeholders(embeddings, is_visual, packed, counts)[..., 0]
    wanted, token = torch.zeros(len(rows), length), 0
    for r, text in enumerate(expanded):  # slow and obvious
        for column, letter in enumerate(text):
            if letter == "#":
                token += 1
                wanted[r, column] = token
    assert torch.equal(placed, wanted) and embeddings.eq(0).all()
    assert images_per_row(is_visual.sum(1).tolist(), counts) == [len(row) for row in rows]


@given(rows=rows_of_counts, copies=st.integers(1, 3))
def test_beams_repeat_a_row_with_all_its_images(rows, copies):
    names = [[(r, i) for i in range(len(row))] for r, row in enumerate(rows)]
    flat = [name for row in names for name in row]
    repeated = [name for row in names for _ in range(copies) for name in row]
    assert [flat[i] for i in repeated_indices([len(row) for row in rows], copies)] == repeated


def test_what_does_not_match_is_said_with_both_numbers():
    with pytest.raises(ValueError, match=r"hold 2 '<image>' but there are 1 images"):
        expand_placeholders(["<image> <image>"], "<image>", [3])
    with pytest.raises(ValueError, match=r"Row 0 has 4 placeholders.*\[3, 3\] = 6"):
        images_per_row([4], [3, 3])
    with pytest.raises(ValueError, match="Row 1 has 3 placeholders"):
        images_per_row([3, 3], [3])
    with pytest.raises(ValueError, match="for 1 images, but there are 2"):
        images_per_row([3, 0], [3, 2])
    same_total = torch.tensor([[True, True, False], [True, True, True]])
    with pytest.raises(ValueError, match="Row 0 has 2"):  # five and five, yet image 0 would lose a token to row 1
        replace_placeholders(torch.zeros(2, 3, 4), same_total, torch.zeros(5, 4), [3, 2])
