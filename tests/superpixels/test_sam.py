"""The SAM generator on a tiny SAM with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from lavis_svp.superpixels import SamEmbedding, SuperpixelGenerator, build_superpixels
from lavis_svp.superpixels.sam import grid_points

WIDTH, SIDE = 32, 128
LENIENT = {"points_per_side": 4, "pred_iou": -10.0, "stability": 0.0}
"""Random weights are sure of nothing."""


@pytest.fixture(scope="module")
def parts() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    prompt_encoder = PromptEncoder(WIDTH, (SIDE // 16,) * 2, (SIDE, SIDE), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=1, embedding_dim=WIDTH, mlp_dim=64, num_heads=4)
    mask_decoder = MaskDecoder(
        transformer_dim=WIDTH, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=WIDTH
    )
    return {"prompt_encoder": prompt_encoder.eval(), "mask_decoder": mask_decoder.eval()}


def embedding(seed: int = 0, input_size: tuple[int, int] = (90, 128)) -> SamEmbedding:
    values = torch.randn(WIDTH, SIDE // 16, SIDE // 16, generator=torch.Generator().manual_seed(seed))
    return SamEmbedding(values, input_size, (input_size[0] * 3, input_size[1] * 3), SIDE)


def lenient(parts: dict[str, torch.nn.Module], **options: object) -> SuperpixelGenerator:
    return build_superpixels("sam", **parts, **{**LENIENT, **options})


def test_gives_regions_over_the_valid_area_and_leaves_the_embedding_alone(parts: dict[str, torch.nn.Module]) -> None:
    given = [embedding(0), embedding(1, (128, 37))]
    before = [item.embedding.clone() for item in given]
    first, second = lenient(parts)(embeddings=given)
    assert first.size == (23, 32) and second.size == (32, 10)
    assert first.count > 2 and set(first.levels.tolist()) <= {-1, 0, 1, 2}
    assert all(torch.equal(item.embedding, old) for item, old in zip(given, before, strict=True))
    alone = lenient(parts)(embeddings=[given[1]])[0]
    assert np.array_equal(alone.labels, second.labels)


def test_chunks_change_nothing(parts: dict[str, torch.nn.Module]) -> None:
    maps = [lenient(parts, chunk=chunk)(embeddings=[embedding()])[0].labels for chunk in (1, 5, 64)]
    for labels in maps[1:]:
        assert (labels == maps[0]).mean() > 0.98  # float noise may move single pixels


def test_decoder_outputs_are_subpart_part_whole(parts: dict[str, torch.nn.Module]) -> None:
    """Only level 2 passes when only it gets a bonus that lifts it over the threshold."""
    regions = lenient(parts, pred_iou=50.0, level_bonus=[0, 0, 100], uncovered="ignore")(embeddings=[embedding()])[0]
    assert set(regions.levels.tolist()) == {2}


def test_nothing_found_gives_one_region(parts: dict[str, torch.nn.Module]) -> None:
    regions = build_superpixels("sam", **parts, points_per_side=2, pred_iou=50.0)(embeddings=[embedding()])[0]
    assert regions.count == 1 and regions.coverage() == 1 and regions.size == (23, 32)


def test_half_precision_embeddings_are_taken(parts: dict[str, torch.nn.Module]) -> None:
    stored = embedding()._replace(embedding=embedding().embedding.half())
    assert lenient(parts)(embeddings=[stored])[0].count > 2


def test_settings_tell_weights_and_options_apart(parts: dict[str, torch.nn.Module]) -> None:
    settings = lenient(parts).settings()
    assert settings == lenient(parts, chunk=7).settings()
    assert settings != lenient(parts, points_per_side=5).settings()
    assert settings != lenient(parts, encoder_name="vit_h").settings()
    other = PromptEncoder(WIDTH, (SIDE // 16,) * 2, (SIDE, SIDE), mask_in_chans=8)
    assert settings != lenient({**parts, "prompt_encoder": other}).settings()


def test_grid_points_lie_in_cell_centres_of_the_valid_area() -> None:
    points = grid_points((60, 128), 2)
    assert points.tolist() == [[32, 15], [96, 15], [32, 45], [96, 45]]
    slim = grid_points((7, 1024), 32)
    assert slim.shape == (1024, 2) and (slim > 0).all() and (slim < torch.tensor([1024, 7])).all()


def test_bad_input_is_named(parts: dict[str, torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="needs prompt_encoder and mask_decoder"):
        build_superpixels("sam")
    with pytest.raises(ValueError, match="did you mean 'pred_iou'"):
        build_superpixels("sam", **parts, pred_iuo=0.5)
    with pytest.raises(ValueError, match="pass embeddings="):
        lenient(parts)([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match="Build both for the same side"):
        lenient(parts)(embeddings=[embedding()._replace(side=256)])
    with pytest.raises(ValueError, match="does not lie within"):
        lenient(parts)(embeddings=[embedding()._replace(input_size=(129, 5))])
    parts["mask_decoder"].num_multimask_outputs, before = 4, parts["mask_decoder"].num_multimask_outputs
    with pytest.raises(ValueError, match="3 outputs a prompt, this has 4"):
        lenient(parts)
    parts["mask_decoder"].num_multimask_outputs = before
