from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from lavis_svp.heads.mask_head import Frame, SegMaskDecoder
from lavis_svp.language.splice import VisualPositions
from lavis_svp.models.frozen import VisionFeatures
from lavis_svp.models.tokens import centroid_positions, framed_areas, shuffled, token_areas, token_positions
from lavis_svp.projectors import build_projector
from lavis_svp.projectors.structures import PatchFeatures, Superpixels, VisualTokens


def make_head():
    transformer = TwoWayTransformer(depth=1, embedding_dim=256, mlp_dim=8, num_heads=2)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    return SegMaskDecoder(PromptEncoder(256, (4, 4), (64, 64), 16), decoder)


def test_positions_are_patch_centres_in_sams_frame():
    features = PatchFeatures(torch.zeros(1, 6, 3), [(2, 3)], torch.ones(1, 6, dtype=torch.bool))
    frame = Frame(64, (32, 64), (100, 200))  # twice as wide as high: it fills the upper half of SAM's square
    head = make_head()
    visual = VisualTokens(torch.zeros(1, 6, 4), torch.ones(1, 6, dtype=torch.bool), torch.eye(6)[None])
    stretched = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [frame], [(1.0, 1.0)])
    got = token_positions(visual, stretched, head)
    for n in range(6):
        x, y = (n % 3 + 0.5) / 3, (n // 3 + 0.5) / 2 * 0.5
        torch.testing.assert_close(got[0, n], head.position_of(torch.tensor(x), torch.tensor(y)))
    padded = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [frame], [(0.5, 1.0)])
    got = token_positions(visual, padded, head)
    torch.testing.assert_close(got[0, 0], head.position_of(torch.tensor(0.5 / 3), torch.tensor(0.25)))


def test_areas_follow_the_tokens_order():
    masks = torch.rand(1, 3, 4, 4)
    superpixels = Superpixels(torch.rand(1, 3, 4), masks, torch.ones(1, 3, dtype=torch.bool))
    valid = torch.tensor([[True, True, False]])
    visual = VisualTokens(torch.zeros(1, 3, 2), valid, torch.zeros(1, 3, 4), torch.tensor([[2, 0, -1]]))
    areas = token_areas(visual, superpixels, [(2, 2)])
    torch.testing.assert_close(areas[0, :2], masks[0, [2, 0]])
    assert areas[0, 2].sum() == 0
    patches = VisualTokens(torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool), torch.eye(4)[None])
    torch.testing.assert_close(token_areas(patches, None, [(2, 2)])[0].flatten(1), torch.eye(4))


def test_the_area_of_a_whole_image_token_is_the_image():
    masks = torch.rand(1, 2, 4, 4)
    superpixels = Superpixels(torch.rand(1, 2, 4), masks, torch.ones(1, 2, dtype=torch.bool))
    visual = VisualTokens(torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), None, torch.tensor([[-1, 1, 0]]))
    areas = token_areas(visual, superpixels, [(2, 2)])
    assert areas[0, 0].eq(1).all()
    torch.testing.assert_close(areas[0, 1:], masks[0, [1, 0]])


def test_areas_are_framed_as_the_patch_grid_saw_the_image():
    features = PatchFeatures(torch.zeros(1, 8, 3), [(2, 4)], torch.ones(1, 8, dtype=torch.bool))
    frame = Frame(64, (32, 64), (100, 200))  # twice as wide as high: it fills the upper half of SAM's square
    areas = torch.ones(1, 2, 4)
    stretched = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [frame], [(1.0, 1.0)])
    framed = framed_areas(areas, stretched, torch.tensor([0]))
    assert framed.shape == (1, 16, 16)
    assert framed[0, :8].eq(1).all() and framed[0, 8:].eq(0).all()
    padded = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [frame], [(0.5, 1.0)])
    upper = torch.tensor([[[1.0] * 4, [0.0] * 4]])  # a grid padded like SAM: the upper row is the image
    framed = framed_areas(upper, padded, torch.tensor([0]))
    assert framed[0, :8].eq(1).all() and framed[0, 8:].eq(0).all()


def test_shuffling_leaves_a_whole_image_token_in_front():
    order = torch.tensor([[-1, *range(9)]])
    tokens = order[..., None].float()
    for seed in range(5):
        torch.manual_seed(seed)
        mixed = shuffled(VisualTokens(tokens, torch.ones(1, 10, dtype=torch.bool), None, order))
        assert mixed.order[0, 0] == -1 and sorted(mixed.order[0].tolist()) == list(range(-1, 9))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_centroid_positions_equal_a_slow_search(h, w, rows, columns, seed):
    """The valid patches, rows x columns of them, are counted in raster order until the one under the centroid."""
    rows, columns = min(rows, h), min(columns, w)
    random = torch.Generator().manual_seed(seed)
    valid = torch.zeros(h, w, dtype=torch.bool)
    valid[:rows, :columns] = True
    valid = torch.cat([valid.flatten(), torch.zeros(3, dtype=torch.bool)])[None]  # padding of the batch
    assignment = torch.rand(1, 4, h * w + 3, generator=random) * valid[:, None]
    assignment = assignment / assignment.sum(2, keepdim=True)
    features = PatchFeatures(torch.zeros(1, h * w + 3, 2), [(h, w)], valid)
    token_valid = torch.tensor([[True, True, True, False]])
    (places,) = centroid_positions(VisualTokens(torch.zeros(1, 4, 2), token_valid, assignment), features)
    assert places.span == rows * columns
    for t, offset in enumerate(places.offsets):
        y = sum(float(assignment[0, t, n]) * (n // w + 0.5) for n in range(h * w))
        x = sum(float(assignment[0, t, n]) * (n % w + 0.5) for n in range(h * w))
        assert offset == int(round(y, 3)) * columns + int(round(x, 3))
    assert len(places.offsets) == 3


def test_centroid_positions_of_patches_are_their_indices():
    valid = torch.zeros(2, 12, dtype=torch.bool)
    valid[0] = True
    valid[1, [0, 1, 3, 4]] = True  # a letter-boxed image: two rows of two in a grid of three columns
    features = PatchFeatures(torch.randn(2, 12, 4), [(3, 4), (3, 3)], valid)
    visual = build_projector("mlp", vision_dim=4, llm_dim=3, grid=(3, 4))(features)
    assert centroid_positions(visual, features) == [VisualPositions.by_index(12), VisualPositions.by_index(4)]
    with pytest.raises(ValueError, match="visual_positions to index"):
        centroid_positions(VisualTokens(visual.tokens, visual.valid), features)


def test_shuffling_moves_everything_together_and_keeps_padding_last():
    torch.manual_seed(0)
    tokens = torch.arange(12.0).reshape(2, 6, 1)
    valid = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    order = torch.arange(6).expand(2, 6)
    mixed = shuffled(VisualTokens(tokens, valid, tokens.expand(2, 6, 3), order))
    for image in range(2):
        torch.testing.assert_close(mixed.tokens[image, :, 0], mixed.order[image] + 6.0 * image)
        torch.testing.assert_close(mixed.assignment[image, :, 1], mixed.tokens[image, :, 0])
    assert sorted(mixed.order[1, :3].tolist()) == [0, 1, 2]
    assert mixed.order[0].tolist() != list(range(6))
