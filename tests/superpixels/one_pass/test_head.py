"""The boundary head: shapes, folding, independence of images, and SAM's up-scaler in it."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import nn

from lavis_svp.superpixels.one_pass.head import LEVELS, BoundaryHead, boundary_strength


@pytest.fixture(scope="module")
def upscaler() -> nn.Module:
    """That of a mask decoder as SAM has it, with random weights."""
    torch.manual_seed(1)
    transformer = TwoWayTransformer(depth=1, embedding_dim=256, num_heads=8, mlp_dim=8)
    return MaskDecoder(transformer_dim=256, transformer=transformer).output_upscaling


def sources(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, 256, 3, 5) and images at stride 4."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, 256, 3, 5, generator=random), torch.rand(count, 3, 12, 20, generator=random)


def test_maps_have_strides_4_and_8() -> None:
    output = BoundaryHead(affinities=7).eval()(*sources())
    assert output.boundaries.shape == (2, LEVELS, 12, 20) and output.affinities.shape == (2, 7, 6, 10)
    strength = boundary_strength(output.boundaries)
    assert strength.shape == (2, 12, 20) and strength.min() >= 0 and strength.max() <= 1


def test_folding_changes_nothing_and_leaves_the_head_alone(random_head: BoundaryHead) -> None:
    before = {name: value.clone() for name, value in random_head.state_dict().items()}
    whole, folded = random_head(*sources()), random_head.folded()(*sources())
    for one, other in zip(whole, folded, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in random_head.state_dict().items())


def test_no_image_depends_on_another(random_head: BoundaryHead) -> None:
    embeddings, images = sources(3)
    together, alone = random_head(embeddings, images), random_head(embeddings[1:2], images[1:2])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[1:2], other, atol=1e-5, rtol=1e-5)


def test_sams_up_scaler_is_taken_over_and_stays_frozen(upscaler: nn.Module) -> None:
    head = BoundaryHead(coarse=8, width=8, fine=4, affinities=3)
    head.copy_upscaler(upscaler)
    embeddings, images = sources()
    with torch.no_grad():
        assert torch.equal(head.upscaler(embeddings), upscaler(embeddings))
    optimizer = torch.optim.AdamW(head.parameters(), 0.1, weight_decay=0.1)
    output = head(embeddings, images)
    (output.boundaries.mean() + output.affinities.mean()).backward()
    optimizer.step()
    for name, value in upscaler.state_dict().items():
        assert torch.equal(head.upscaler.state_dict()[name], value)
        assert torch.equal(head.folded().upscaler.state_dict()[name], value)
