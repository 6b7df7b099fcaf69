"""`token_packer` against a bilinear resize and a loop over cells."""

import pytest
import torch
from projector_checks import make_batch, make_projector
from torch.nn import functional as F

from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.baselines.token_packer import TokenPackerOptions, TokenPackerProjector, bilinear_weights


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5])
def test_coarse_patches_are_a_bilinear_resize(scale):
    image = torch.randn(1, 3, 2 * scale, 3 * scale)
    cells = F.unfold(image, scale, stride=scale).view(3, scale**2, 6)  # (C, K, T)
    resized = F.interpolate(image, scale_factor=1 / scale, mode="bilinear").flatten(2)[0]  # (C, T)
    weights = bilinear_weights(scale, image.device)
    torch.testing.assert_close(torch.einsum("k,ckt->ct", weights / weights.sum(), cells), resized)


@torch.no_grad()
@pytest.mark.parametrize("num_levels", [1, 2])
def test_tokens_and_assignment_are_those_of_a_loop(num_levels):
    projector = make_projector("token_packer", scale=2, heads=2, num_levels=num_levels)
    features, _ = make_batch([(4, 6)], cut=[(1, 0)], levels=num_levels)
    result = projector(features)
    fine = features.patches if num_levels == 1 else torch.cat(list(features.levels.unbind(1)), dim=2)  # (1, N, L C)
    for t in range(6):
        top, left = t // 3 * 2, t % 3 * 2
        own = [(top + i) * 6 + left + j for i in range(2) for j in range(2) if top + i < 3]
        coarse = projector.coarse(features.patches[0, own].mean(0))
        query = projector.query(coarse)
        keys = projector.key(projector.fine_keys(fine[0, own]))
        values = projector.value(projector.fine_values(fine[0, own]))
        seen, attention = torch.zeros(16), torch.zeros(len(own))
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            weights = torch.stack([query[part] @ key[part] / 8**0.5 for key in keys]).softmax(0)
            seen[part] = weights @ values[:, part]
            attention += weights / 2
        expected = projector.head(projector.out(seen))
        torch.testing.assert_close(result.tokens[0, t], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result.assignment[0, t, own], attention, atol=1e-5, rtol=1e-4)
        assert result.assignment[0, t].count_nonzero() <= len(own)


def test_a_cell_with_valid_patches_only_beside_its_middle_takes_their_mean():
    projector = make_projector("token_packer", scale=4, heads=2)
    patches = torch.randn(1, 16, 16)
    valid = torch.zeros(4, 4, dtype=torch.bool)
    valid[:, 0] = True  # the middle patches, columns 1 and 2, are padding
    result = projector(PatchFeatures(patches, [(4, 4)], valid.view(1, 16)))
    single = PatchFeatures(
        patches[:, [0, 4, 8, 12]].mean(1, keepdim=True).expand(1, 16, 16), [(4, 4)], valid.view(1, 16)
    )
    coarse = projector.coarse(single.patches[0, 0])
    keys = projector.key(projector.fine_keys(patches[0, [0, 4, 8, 12]]))
    scores = (keys.view(4, 2, 8) * projector.query(coarse).view(1, 2, 8)).sum(2) / 8**0.5  # (4, heads)
    torch.testing.assert_close(result.assignment[0, 0, [0, 4, 8, 12]], scores.softmax(0).mean(1), atol=1e-5, rtol=1e-4)


def test_levels_are_required_and_counted():
    projector = make_projector("token_packer", scale=2, heads=2, num_levels=3)
    assert projector.requires == {"levels"} and not make_projector("token_packer", scale=2, heads=2).requires
    features, _ = make_batch([(4, 6)], levels=2)
    with pytest.raises(ValueError, match="num_levels = 3.*gives 2 levels"):
        projector(features)
    features.levels = None
    with pytest.raises(ValueError, match="'token_packer' needs levels"):
        projector(features)


def test_a_width_that_the_heads_do_not_divide_loses_its_remainder_inside():
    projector = TokenPackerProjector(19, 8, (4, 4), TokenPackerOptions(heads=4))
    assert projector.query.out_features == 16 and projector.out.out_features == 19
    with pytest.raises(ValueError, match="width 19 into 20 heads"):
        TokenPackerProjector(19, 8, (4, 4), TokenPackerOptions(heads=20))
