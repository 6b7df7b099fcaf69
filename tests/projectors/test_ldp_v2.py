"""`ldp_v2` against pooling and convolution written out."""

import torch
from torch.nn import functional as F

from lavis_svp.projectors.testing import make_batch, make_projector


def test_tokens_are_those_of_a_loop_over_the_image_alone():
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
