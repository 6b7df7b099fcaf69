"""Cutting ragged, letter-boxed grids into cells; the two projectors of cells, `patch_merger` against Qwen's own."""

import pytest
import torch
from projector_checks import make_batch, make_projector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from lavis_svp.projectors import PatchFeatures, build_projector
from lavis_svp.projectors.baselines.cells import cut_into_cells

C, D = 16, 24


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


def test_an_image_whose_grid_does_not_divide_is_refused():
    features, _ = make_batch([(6, 4), (3, 4)])
    with pytest.raises(
        ValueError, match="'pixel_shuffle' joins cells of 2x2 patches, and a 3x4 patch grid.*2x4 and 4x4"
    ):
        make_projector("pixel_shuffle", ratio=2)(features)
    with pytest.raises(ValueError, match="3x4"):
        make_projector("pixel_shuffle", ratio=2).num_tokens((3, 4))


def by_cells(patches, grid):
    """(N, C) row-major patches in the order of Qwen's vision tower: cell after cell, row-major within each."""
    h, w = grid
    return patches.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).reshape(h * w, -1)  # (N, C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(6, 4), (2, 8)])
@pytest.mark.parametrize(
    ("norm", "make"),
    [("rms", lambda: Qwen2_5_VLPatchMerger(dim=D, context_dim=C)), ("layer", lambda: PatchMerger(D, C))],
    ids=["qwen2_5_vl", "qwen2_vl"],
)
def test_qwens_weights_are_carried_one_to_one_and_give_the_same_bits(norm, make, grid, dtype):
    torch.manual_seed(0)
    theirs = make()
    torch.nn.init.normal_(theirs.ln_q.weight)
    theirs = theirs.to(dtype)
    ours = build_projector("patch_merger", vision_dim=C, llm_dim=D, grid=grid, norm=norm).to(dtype)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    patches = torch.randn(1, grid[0] * grid[1], C).to(dtype)
    assert torch.equal(ours(PatchFeatures.whole(patches, grid)).tokens[0], theirs(by_cells(patches[0], grid)))


def test_two_images_of_one_grid_give_the_bits_of_qwens_packed_sequence():
    torch.manual_seed(0)
    theirs = Qwen2_5_VLPatchMerger(dim=D, context_dim=C)
    ours = build_projector("patch_merger", vision_dim=C, llm_dim=D, grid=(4, 6))
    ours.load_state_dict(theirs.state_dict())
    patches = torch.randn(2, 24, C)
    packed, lengths = ours(PatchFeatures.whole(patches, (4, 6))).packed()
    assert lengths == [6, 6]
    assert torch.equal(packed, theirs(torch.cat([by_cells(p, (4, 6)) for p in patches])))
