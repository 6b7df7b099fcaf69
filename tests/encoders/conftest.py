"""Small encoders of the real structure, with random weights."""

import pytest
import torch

from lavis_svp.encoders.sam import build_mask_decoder, build_prompt_encoder
from lavis_svp.encoders.sam_vit import SamVitShape, build_sam_vit
from lavis_svp.encoders.tinyvit import TinyViTEncoder

TINY_SHAPE = SamVitShape(width=32, depth=3, heads=2, global_blocks=(1,))


def _randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


@pytest.fixture
def tiny_shape():
    return TINY_SHAPE


@pytest.fixture(scope="session")
def tiny_sam_state():
    """The state dict of a SAM with a very small ViT, side 1024, named as Meta's checkpoints are."""
    parts = {
        "image_encoder": build_sam_vit(TINY_SHAPE, 1024),
        "prompt_encoder": build_prompt_encoder(1024),
        "mask_decoder": build_mask_decoder(),
    }
    return {f"{p}.{k}": v for p, module in parts.items() for k, v in _randomised(module).state_dict().items()}


@pytest.fixture
def tiny_sam_file(tiny_sam_state, tmp_path):
    path = tmp_path / "sam_vit_t.pth"
    torch.save(tiny_sam_state, path)
    return path


@pytest.fixture
def tinyvit():
    return _randomised(TinyViTEncoder())
