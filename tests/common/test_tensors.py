"""Cells that lie anywhere on an image, against a loop over pixels; cells of equal size against the plain grid."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.tensors import CellEdges, cell_overlap, interval_overlap


def random_edges(rng, cells):
    """Ascending cells with gaps, from outside the image to outside it."""
    return torch.from_numpy(np.sort(rng.uniform(-0.3, 1.3, 2 * cells)) + 1e-3 * np.arange(2 * cells)).reshape(cells, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9))
def test_against_a_loop_over_pixels(seed, cells, pixels):
    edges = random_edges(np.random.default_rng(seed), cells)
    found = interval_overlap(edges, pixels)
    for cell, (start, stop) in enumerate(edges.tolist()):
        for pixel in range(pixels):
            both = max(0.0, min(stop, (pixel + 1) / pixels) - max(start, pixel / pixels))
            assert abs(float(found[cell, pixel]) - both / (stop - start)) < 1e-5


@given(st.integers(1, 7), st.integers(1, 9), st.floats(0.1, 1.0))
def test_equal_cells_are_the_plain_grid(cells, pixels, extent):
    first = torch.arange(cells, dtype=torch.float64)[:, None]
    edges = torch.cat([first, first + 1], dim=1) / cells / extent
    assert torch.allclose(interval_overlap(edges, pixels), cell_overlap(cells, pixels, extent), atol=1e-5)


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 12))
def test_resampled_cells_keep_the_field_of_view_and_their_places(seed, cells, new):
    edges = random_edges(np.random.default_rng(seed), cells)
    made = CellEdges(edges, edges).resampled((new, cells))
    assert made.grid == (new, cells) and torch.allclose(made.columns, edges)
    assert torch.isclose(made.rows[0, 0], edges[0, 0]) and torch.isclose(made.rows[-1, 1], edges[-1, 1])
    assert (made.rows[:, 1] > made.rows[:, 0]).all() and (made.rows[1:, 0] >= made.rows[:-1, 1] - 1e-9).all()
    halves = CellEdges(edges, edges).resampled((2 * cells, 1)).rows
    middles = edges.mean(dim=1)
    assert torch.allclose(halves[0::2], torch.stack([edges[:, 0], middles], dim=1))
    assert torch.allclose(halves[1::2], torch.stack([middles, edges[:, 1]], dim=1))


def test_axes_without_pixels_or_cells_without_length_are_refused():
    with pytest.raises(ValueError, match="positive length"):
        interval_overlap(torch.tensor([[0.5, 0.5]]), 3)
    with pytest.raises(ValueError, match="got 0 pixels"):
        interval_overlap(torch.tensor([[0.0, 0.5]]), 0)
