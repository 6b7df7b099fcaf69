"""Cutting ragged, letter-boxed grids into cells, and the projectors that only differ in what they do with a cell."""

import pytest
import torch

from lavis_svp.projectors.cell_projector import cut_into_cells
from lavis_svp.projectors.testing import make_batch, make_projector


def slow_cells(features, image, side):
    """The cells of one image as lists of patch indices, None in padding."""
    h, w = features.grids[image]
    cells = []
    for top in range(0, h, side):
        for left in range(0, w, side):
            places = [(top + i) * w + left + j for i in range(side) for j in range(side)]
            places = [n if features.valid[image, n] else None for n in places]
            if any(n is not None for n in places):
                cells.append(places)
    return cells


@pytest.mark.parametrize("side", [1, 2, 3])
def test_cells_are_those_of_a_loop(side):
    grids = [(4 * side, 2 * side), (side, 3 * side), (2 * side, 5 * side)]
    features, _ = make_batch(grids, cut=[(side + 1, 0), (0, side), (0, 1)])
    cells = cut_into_cells(features, side)
    for b in range(3):
        expected = slow_cells(features, b, side)
        count = int(cells.valid[b].sum())
        assert cells.valid[b].tolist() == [True] * count + [False] * (cells.valid.shape[1] - count)
        found = [
            [n if real else None for n, real in zip(index, inside, strict=True)]
            for index, inside in zip(cells.index[b, :count].tolist(), cells.inside[b, :count].tolist(), strict=True)
        ]
        assert found == expected


@pytest.mark.parametrize("name", ["pixel_shuffle", "patch_merger"])
def test_tokens_are_those_of_a_loop_over_cells(name):
    projector = make_projector(name, **({"ratio": 2} if name == "pixel_shuffle" else {}))
    features, _ = make_batch([(6, 4), (2, 8)], cut=[(1, 0), (0, 1)])
    result = projector(features)
    for b in range(2):
        cells = slow_cells(features, b, 2)
        assert int(result.valid[b].sum()) == len(cells)
        for t, places in enumerate(cells):
            patches = [torch.zeros(16) if n is None else features.patches[b, n] for n in places]
            if name == "pixel_shuffle":
                expected = projector.head(projector.norm(torch.cat(patches)))
            else:
                scaled = [x / (x.square().mean() + 1e-6).sqrt() * projector.ln_q.weight for x in patches]
                expected = projector.mlp(torch.cat(scaled))
            torch.testing.assert_close(result.tokens[b, t], expected, atol=1e-5, rtol=1e-5)
            real = [n for n in places if n is not None]
            even = torch.zeros(24)
            even[real] = 1 / len(real)
            torch.testing.assert_close(result.assignment[b, t], even)


def test_a_image_whose_grid_does_not_divide_is_refused():
    features, _ = make_batch([(6, 4), (3, 4)])
    with pytest.raises(
        ValueError, match="'pixel_shuffle' joins cells of 2x2 patches, and a 3x4 patch grid.*2x4 and 4x4"
    ):
        make_projector("pixel_shuffle", ratio=2)(features)
    with pytest.raises(ValueError, match="3x4"):
        make_projector("pixel_shuffle", ratio=2).num_tokens((3, 4))
