"""`avg_pool` and `ldp_v2` against pooling and convolution written out; `mask_pool` on a grid of regions."""

import numpy as np
import pytest
import torch
from projector_checks import make_batch, make_projector
from torch.nn import functional as F

from lavis_svp.projectors import PatchFeatures, Superpixels, build_projector
from lavis_svp.superpixels.region_map import RegionMap

C, D, GRID = 16, 24, (6, 4)


def build(name, **options):
    return build_projector(name, vision_dim=C, llm_dim=D, grid=GRID, **options)


@pytest.mark.parametrize("tokens", [(3, 2), (2, 4), (6, 4), (1, 1)])
def test_grid_labels_through_mask_pool_equal_avg_pool(tokens):
    rows, columns = np.arange(48) * tokens[0] // 48, np.arange(32) * tokens[1] // 32
    region_map = RegionMap.from_labels(rows[:, None] * tokens[1] + columns[None])
    features = PatchFeatures.whole(torch.randn(2, 24, C), GRID)
    masked = build("mask_pool")
    averaged = build("avg_pool", tokens_h=tokens[0], tokens_w=tokens[1])
    averaged.load_state_dict(masked.state_dict())
    superpixels = Superpixels.from_region_maps([region_map] * 2, [GRID] * 2, mask_size=None)
    assert torch.allclose(masked(features, superpixels).tokens, averaged(features).tokens, atol=1e-5)


@pytest.mark.parametrize("tokens", [(3, 2), (4, 3), (5, 4)])
def test_avg_pool_is_adaptive_average_pooling_of_the_valid_rectangle(tokens):
    projector = build("avg_pool", tokens_h=tokens[0], tokens_w=tokens[1])
    patches = torch.randn(1, 24, C)
    valid = torch.zeros(6, 4, dtype=torch.bool)
    valid[:5, :3] = True
    image = patches.view(1, 6, 4, C)[:, :5, :3].permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(image, tokens).flatten(2).transpose(1, 2)
    result = projector(PatchFeatures(patches, [GRID], valid.view(1, 24)))
    assert torch.allclose(result.tokens, projector.head(pooled), atol=1e-5)


def test_ldp_v2_tokens_are_those_of_a_loop_over_the_image_alone():
    projector = make_projector("ldp_v2", tokens_h=3, tokens_w=2)
    features, _ = make_batch([(7, 5), (4, 4)], cut=[(2, 1), (0, 0)])
    tokens = projector(features).tokens
    kernel, bias = projector.position.weight[:, 0], projector.position.bias  # (D, 3, 3), (D,)
    for b, (height, width) in enumerate([(5, 4), (4, 4)]):
        h, w = features.grids[b]
        alone = features.patches[b, : h * w].view(h, w, -1)[:height, :width]
        hidden = projector.head(alone).permute(2, 0, 1)  # (D, height, width)
        pooled = F.adaptive_avg_pool2d(hidden, (3, 2))  # (D, 3, 2)
        for row in range(3):
            for column in range(2):
                expected = pooled[:, row, column] + bias
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= row + i < 3 and 0 <= column + j < 2:
                            expected = expected + kernel[:, i + 1, j + 1] * pooled[:, row + i, column + j]
                torch.testing.assert_close(tokens[b, 2 * row + column], expected, atol=1e-5, rtol=1e-5)
