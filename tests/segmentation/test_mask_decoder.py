from __future__ import annotations

import copy

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from lavis_svp.segmentation.mask_decoder import SegMaskDecoder

SIDE = 64


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    prompt = PromptEncoder(256, (4, 4), (SIDE, SIDE), 16)
    transformer = TwoWayTransformer(depth=1, embedding_dim=256, mlp_dim=64, num_heads=4)
    sam_decoder = MaskDecoder(transformer_dim=256, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=32)
    return SegMaskDecoder(prompt, sam_decoder).eval()


@torch.no_grad()
@pytest.mark.parametrize("images", [[1, 0, 1], [0, 0, 1], [1, 1, 1], [2, 1, 0], []])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_it_equals_segment_anything_one_by_one_in_any_order(decoder, images, kind):
    torch.manual_seed(1)
    embeddings, prompts = torch.randn(3, 256, 4, 4), torch.randn(len(images), 1, 256)
    logits = decoder(embeddings, prompts, kind(images))
    assert logits.shape == (len(images), 16, 16) and logits.dtype == torch.float32
    for row, index in enumerate(images):
        _, dense = decoder.prompt_encoder(None, None, None)
        mask, _ = decoder.mask_decoder(
            image_embeddings=embeddings[index : index + 1],
            image_pe=decoder.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=prompts[row : row + 1],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(logits[row], mask[0, 0], atol=1e-5, rtol=1e-4)


def test_positions_equal_sams_own_encoding(decoder):
    points = torch.tensor([[10.0, 20.0], [33.0, 5.0]])
    expected = decoder.prompt_encoder.pe_layer.forward_with_coords((points + 0.5)[None], (SIDE, SIDE))[0]
    got = decoder.position_of((points[:, 0] + 0.5) / SIDE, (points[:, 1] + 0.5) / SIDE)
    torch.testing.assert_close(got, expected)
    assert torch.equal(decoder.dense_positions(), decoder.prompt_encoder.get_dense_pe())


def test_positions_are_float32_under_autocast(decoder):
    """bf16 coordinates are off by a pixel of 1024."""
    x, y = torch.rand(2, 50)
    expected = decoder.position_of(x, y), decoder.prompt_encoder.get_dense_pe()
    fresh = copy.deepcopy(decoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fresh.position_of(x, y), fresh.dense_positions()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_mask_under_autocast_stands_on_sams_exact_positions(decoder):
    seen = []
    hook = decoder.mask_decoder.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        copy.deepcopy(decoder)(torch.randn(1, 256, 4, 4), torch.randn(1, 1, 256), torch.tensor([0]))
    hook.remove()
    torch.testing.assert_close(seen[0], decoder.prompt_encoder.get_dense_pe(), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_come_near_float32(decoder, dtype, autocast):
    torch.manual_seed(1)
    embeddings, prompts = torch.randn(2, 256, 4, 4), torch.randn(2, 1, 256)
    image = torch.tensor([0, 1])
    expected = decoder(embeddings, prompts, image)
    cast = copy.deepcopy(decoder).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = cast(embeddings.to(dtype), prompts.to(dtype), image)
        position = cast.position_of(torch.tensor([0.3]), torch.tensor([0.7]))
    assert got.dtype == position.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.1 * float(expected.std()), rtol=0.1)


def test_the_kept_positions_follow_the_weights(decoder):
    """They are kept between batches, and made again after a move, a cast, loaded weights and a copy."""
    module = copy.deepcopy(decoder)
    first = module.dense_positions()
    assert module.dense_positions() is first and not any("dense" in name for name in module.state_dict())
    module.load_state_dict({k: v * 2 if "gaussian" in k else v for k, v in module.state_dict().items()})
    assert torch.equal(module.dense_positions(), module.prompt_encoder.get_dense_pe())
    twin = copy.deepcopy(module)
    twin.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(3)
    assert torch.equal(twin.dense_positions(), twin.prompt_encoder.get_dense_pe())
    assert torch.equal(module.dense_positions(), module.prompt_encoder.get_dense_pe())
    exact = module.dense_positions()
    module.to(torch.bfloat16)
    assert module.dense_positions().dtype == torch.float32
    torch.testing.assert_close(module.dense_positions(), exact, atol=0.1, rtol=0)
    assert module.to("meta").dense_positions().is_meta


def test_only_what_the_single_mask_uses_is_trained(decoder):
    trains = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith("mask_decoder.") for name in trains)
    assert not any("iou_prediction_head" in name or "hypernetworks_mlps.1" in name for name in trains)
