"""`patch_merger` against the real merger of Qwen2.5-VL and Qwen2-VL."""

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from lavis_svp.projectors import PatchFeatures, build_projector

C, D = 16, 24


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
