from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from lavis_svp.heads.mask_head import Frame, SegMaskDecoder, frame_share, mask_to_sam_input, to_original

SIDE = 64


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    prompt = PromptEncoder(256, (4, 4), (SIDE, SIDE), 16)
    transformer = TwoWayTransformer(depth=1, embedding_dim=256, mlp_dim=64, num_heads=4)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=32)
    return SegMaskDecoder(prompt, decoder).eval()


@torch.no_grad()
def test_it_equals_segment_anything_one_by_one_in_any_order(head):
    torch.manual_seed(1)
    embeddings, prompts = torch.randn(2, 256, 4, 4), torch.randn(3, 1, 256)
    image = torch.tensor([1, 0, 1])
    logits, quality = head(embeddings, prompts, image)
    for row, index in enumerate(image.tolist()):
        _, dense = head.prompt_encoder(None, None, None)
        mask, iou = head.mask_decoder(
            image_embeddings=embeddings[index : index + 1],
            image_pe=head.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=prompts[row : row + 1],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(logits[row], mask[0, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(quality[row], iou[0, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_dense_area_changes_the_mask_like_sams_mask_prompt(head):
    embeddings, prompts, image = torch.randn(1, 256, 4, 4), torch.randn(1, 1, 256), torch.tensor([0])
    area = torch.rand(1, 16, 16)
    logits, _ = head(embeddings, prompts, image, area)
    _, dense = head.prompt_encoder(None, None, ((2 * area - 1) * 6.0)[:, None])
    mask, _ = head.mask_decoder(
        image_embeddings=embeddings,
        image_pe=head.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=prompts,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    torch.testing.assert_close(logits[0], mask[0, 0], atol=1e-5, rtol=1e-4)


def test_positions_equal_sams_own_point_encoding(head):
    points = torch.tensor([[10.0, 20.0], [33.0, 5.0]])
    expected = head.prompt_encoder.pe_layer.forward_with_coords((points + 0.5)[None], (SIDE, SIDE))[0]
    got = head.position_of((points[:, 0] + 0.5) / SIDE, (points[:, 1] + 0.5) / SIDE)
    torch.testing.assert_close(got, expected)


def test_only_what_makes_the_mask_trains(head):
    trains = {name for name, p in head.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith("mask_decoder.") for name in trains)
    assert not any("iou_prediction_head" in name or "hypernetworks_mlps.1" in name for name in trains)


frames = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=40, deadline=None)
@given(frames)
def test_a_whole_image_goes_to_the_frame_and_back(size):
    scale = SIDE / max(size)
    inside = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    frame = Frame(SIDE, inside, size)
    share = frame_share(frame, (16, 16))
    assert float(share.sum()) == pytest.approx(inside[0] * inside[1] / 16, rel=1e-4)
    back = to_original(torch.ones(2, 16, 16), frame)
    assert back.shape == (2, *size) and torch.allclose(back, torch.ones(()))


def test_area_shares_equal_a_slow_count():
    torch.manual_seed(0)
    mask = (torch.rand(32, 48) > 0.5).float()
    frame = Frame(64, (32, 48), (32, 48))
    got = mask_to_sam_input(mask[None], frame, (16, 16))[0]
    for row in range(16):
        for column in range(16):
            cell = torch.zeros(64, 64)
            cell[:32, :48] = mask
            expected = cell[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean()
            assert float(got[row, column]) == pytest.approx(float(expected), abs=1e-5)
