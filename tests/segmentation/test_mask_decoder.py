from __future__ import annotations

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
def test_it_equals_segment_anything_one_by_one_in_any_order(decoder):
    torch.manual_seed(1)
    embeddings, prompts = torch.randn(2, 256, 4, 4), torch.randn(3, 1, 256)
    image = torch.tensor([1, 0, 1])
    logits = decoder(embeddings, prompts, image)
    for row, index in enumerate(image.tolist()):
        _, dense = decoder.prompt_encoder(None, None, None)
        mask, _ = decoder.mask_decoder(
            image_embeddings=embeddings[index : index + 1],
            image_pe=decoder.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=prompts[row : row + 1],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(logits[row], mask[0, 0], atol=1e-5, rtol=1e-4)


def test_positions_equal_sams_own_point_encoding(decoder):
    points = torch.tensor([[10.0, 20.0], [33.0, 5.0]])
    expected = decoder.prompt_encoder.pe_layer.forward_with_coords((points + 0.5)[None], (SIDE, SIDE))[0]
    got = decoder.position_of((points[:, 0] + 0.5) / SIDE, (points[:, 1] + 0.5) / SIDE)
    torch.testing.assert_close(got, expected)


def test_only_what_the_single_mask_uses_is_trained(decoder):
    trains = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith("mask_decoder.") for name in trains)
    assert not any("iou_prediction_head" in name or "hypernetworks_mlps.1" in name for name in trains)
