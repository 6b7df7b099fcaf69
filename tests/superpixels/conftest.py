"""A boundary head with random weights, and embeddings for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lavis_svp.superpixels import SamEmbedding
from lavis_svp.superpixels.one_pass.head import BoundaryHead
from lavis_svp.superpixels.one_pass.weights import HeadFacts, save_head


@pytest.fixture(scope="session")
def random_head() -> BoundaryHead:
    """Small; its norms have seen something, and its boundaries are no even grey."""
    torch.manual_seed(0)
    head = BoundaryHead(coarse=8, width=8, fine=4, affinities=3)
    for _ in range(3):
        head(torch.randn(2, 256, 4, 4) + 0.5, torch.rand(2, 3, 16, 16))
    with torch.no_grad():
        head.boundaries[-1].weight *= 8.0
    return head.eval()


@pytest.fixture(scope="session")
def random_head_file(random_head: BoundaryHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_head(path, random_head, HeadFacts("tiny_vit", (128,), {"steps": 0}))
    return path


@pytest.fixture(scope="session")
def embed() -> Callable[..., SamEmbedding]:
    """Makes a random embedding of an image that lies in SAM's input, the image at stride 4 beside it."""

    def make(seed: int = 0, input_size: tuple[int, int] = (90, 128), side: int = 128) -> SamEmbedding:
        random = torch.Generator().manual_seed(seed)
        values = torch.randn(256, side // 16, side // 16, generator=random)
        image = torch.zeros(3, side // 4, side // 4)
        height, width = (-(-length // 4) for length in input_size)
        image[:, :height, :width] = torch.rand(3, height, width, generator=random)
        return SamEmbedding(values, input_size, (input_size[0] * 3, input_size[1] * 3), side, image)

    return make
