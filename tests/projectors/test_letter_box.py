"""A letter-boxed image in a ragged batch gives the tokens of the same image cropped to what is valid."""

import pytest
import torch

from lavis_svp.projectors import PatchFeatures
from lavis_svp.projectors.testing import make_batch, make_projector

CASES = [
    ("avg_pool", {"tokens_h": 3, "tokens_w": 2}),
    ("c_abstractor", {"tokens_h": 3, "tokens_w": 2, "blocks": 2}),
    ("dpc_knn", {"count": 6}),
    ("ldp_v2", {"tokens_h": 3, "tokens_w": 2}),
    ("mlp", {}),
    ("patch_merger", {}),
    ("perceiver", {"num_queries": 5, "depth": 2, "heads": 2, "head_dim": 4}),
    ("pixel_shuffle", {"ratio": 2}),
    ("token_packer", {"scale": 2, "heads": 2}),
    ("vision_zip", {"dominant": 4, "contextual": 3}),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_equals_the_cropped_image(name, options):
    projector = make_projector(name, **options)
    sizes = [(6, 4), (4, 10), (8, 6)]
    features, _ = make_batch([(8, 6), (6, 10), (8, 6)], cut=[(2, 2), (2, 0), (0, 0)])
    packed, lengths = projector(features).packed()
    for b, ((height, width), tokens) in enumerate(zip(sizes, packed.split(lengths), strict=True)):
        real = features.valid[b]
        cropped = PatchFeatures(
            features.patches[b : b + 1, real],
            [(height, width)],
            torch.ones(1, height * width, dtype=torch.bool),
            cls_attention=features.cls_attention[b : b + 1, real],
            keys=features.keys[b : b + 1, real],
        )
        torch.testing.assert_close(projector(cropped).packed()[0], tokens, atol=1e-5, rtol=1e-5)
