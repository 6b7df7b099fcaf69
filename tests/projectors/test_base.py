"""What every projector keeps: tests over the registry, so that a new projector brings its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lavis_svp.projectors import PatchFeatures, Superpixels, build_projector, list_projectors
from lavis_svp.projectors.testing import CHECKS, make_batch
from lavis_svp.superpixels.region_map import RegionMap

C, D, GRID = 16, 24, (6, 4)
SMALL = {  # a projector without an entry is tested with its defaults
    "avg_pool": {"tokens_h": 3, "tokens_w": 2},
    "c_abstractor": {"tokens_h": 3, "tokens_w": 2, "blocks": 1},
    "dpc_knn": {"count": 5, "neighbours": 3},
    "ldp_v2": {"tokens_h": 3, "tokens_w": 2},
    "mask_pool_geometry": {"geometry_width": 32, "mask_size": 8},
    "perceiver": {"num_queries": 5, "depth": 2, "heads": 2, "head_dim": 4},
    "pixel_shuffle": {"ratio": 2},
    "svp": {"sspe_width": 32, "mask_size": 8},
    "token_packer": {"scale": 2, "heads": 2},
    "vision_zip": {"dominant": 4, "contextual": 2},
}
RIVALS = [
    ("c_abstractor", {"tokens_h": 2, "tokens_w": 4, "blocks": 2, "position": False}),
    ("dpc_knn", {}),  # more clusters than the smaller images have patches
    ("dpc_knn", {"kind": "threshold", "threshold": 0.05, "patch_norm": True}),
    ("patch_merger", {"norm": "layer", "token_std": 0.1}),
    ("pixel_shuffle", {"ratio": 3, "patch_norm": True}),
    ("token_packer", {"scale": 3, "num_levels": 3, "heads": 4}),
    ("vision_zip", {}),
    ("vision_zip", {"dominant": 3, "contextual": 0}),
]
VARIANTS = [(name, SMALL.get(name, {})) for name in list_projectors()] + [
    ("svp", {**SMALL["svp"], **extra})
    for extra in (
        {"ssa": "no_shared_sspe", "add_to_tokens": "before_mlp"},
        {"ssa": "off", "sspe_merge": "mean", "sspe_attend": "all"},
        {"sspe": "off", "ssa_blocks": 2},
        {"add_to_tokens": "none", "sspe_self_attention": True, "patch_norm": True, "token_std": 0.1},
        {"sspe": "bbox_mlp", "token_order": "random"},
        {"sspe_queries": 1, "sspe_blocks": 1, "sspe_heads": 1, "token_order": "area"},
    )
]
SUPERPIXEL_VARIANTS = [
    (name, options) for name, options in VARIANTS if name in ("mask_pool", "mask_pool_geometry", "svp")
]
VARIANTS += RIVALS
VARIANTS += [
    ("svp", {**SMALL["svp"], "global_token": "cls"}),
    ("svp", {**SMALL["svp"], "global_token": "mean"}),
    ("mask_pool", {"global_token": "cls"}),
    ("mask_pool_geometry", {**SMALL["mask_pool_geometry"], "global_token": "mean"}),
]
every_projector = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
every_superpixel_projector = pytest.mark.parametrize(("name", "options"), SUPERPIXEL_VARIANTS, ids=str)


def build(name, options, seed=0):
    """A projector whose parameters are all random: also those that start at zero or one."""
    torch.manual_seed(seed)
    projector = build_projector(name, vision_dim=C, llm_dim=D, grid=GRID, **options)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return projector


def batch(grids=(GRID, (3, 5)), seed=0):
    """Images of different grids and superpixel counts; the last grid row of the first shows padding."""
    return make_batch(grids, seed=seed)


@every_projector
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_every_projector_keeps(check, name, options):
    check(name, **options)


@every_superpixel_projector
def test_image_without_superpixels_gives_one_token(name, options):
    projector = build(name, options)
    features, superpixels = batch()
    emptied = Superpixels(superpixels.weights, superpixels.masks, superpixels.valid & torch.tensor([[False], [True]]))
    result = projector(features, emptied)
    assert result.valid[0].sum() == 1 and result.order[0, 0] == -1 and result.tokens.isfinite().all()
    even = features.valid[0] / features.valid[0].sum()
    assert torch.allclose(result.assignment[0, 0], even)
    none = Superpixels(emptied.weights[:1, :0], emptied.masks[:1, :0], emptied.valid[:1, :0])
    alone = projector(PatchFeatures(features.patches[:1], features.grids[:1], features.valid[:1]), none)
    assert torch.allclose(alone.tokens[0, 0], result.tokens[0, 0], atol=1e-5)


@every_superpixel_projector
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_equivariant_to_the_order_of_superpixels(name, options, seed):
    projector = build(name, {**options, "token_order": "given"})
    features, superpixels = batch(grids=(GRID,), seed=seed)
    count = superpixels.valid.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[None]
    plain, shuffled = projector(features, superpixels), projector(features, superpixels.permuted(order))
    assert torch.allclose(plain.tokens[0, order[0]], shuffled.tokens[0], atol=1e-5)
    assert shuffled.order.tolist() == [list(range(count))]
    rows, columns = features.coordinates()
    centroids = (plain.assignment @ torch.stack([rows, columns], dim=2).float())[0] + 0.5  # (S, 2)
    row, column = centroids[:, 0].floor(), centroids[:, 1]
    same = (row[:, None] == row[None]) & ((column[:, None] - column[None]).abs() < 0.01)
    assume(int(same.sum()) == count)  # in one row and column the index decides
    assume((centroids[:, 0] - centroids[:, 0].round()).abs().min() > 0.01)  # on the border of two rows, rounding noise
    sorted_one, sorted_two = (
        build(name, {**options, "token_order": "raster"})(features, s)
        for s in (superpixels, superpixels.permuted(order))
    )
    assert torch.equal(order[0][sorted_two.order[0]], sorted_one.order[0])
    assert torch.allclose(sorted_one.tokens, sorted_two.tokens, atol=1e-5)


@every_superpixel_projector
def test_order_names_the_superpixel_of_each_token(name, options):
    features, superpixels = batch()
    result = build(name, options)(features, superpixels)
    for b in range(2):
        count = int(superpixels.valid[b].sum())
        assert sorted(result.order[b, :count].tolist()) == list(range(count))
        assert result.order[b, count:].eq(-1).all()
        for t in range(count):
            weights = superpixels.weights[b, result.order[b, t]] * features.valid[b]
            assert torch.allclose(result.assignment[b, t], weights / weights.sum(), atol=1e-5)


@pytest.mark.parametrize("tokens", [(3, 2), (2, 4), (6, 4), (1, 1)])
def test_grid_labels_through_mask_pool_equal_avg_pool(tokens):
    rows, columns = np.arange(48) * tokens[0] // 48, np.arange(32) * tokens[1] // 32
    region_map = RegionMap.from_labels(rows[:, None] * tokens[1] + columns[None])
    features = PatchFeatures.whole(torch.randn(2, 24, C), GRID)
    masked = build("mask_pool", {})
    averaged = build("avg_pool", {"tokens_h": tokens[0], "tokens_w": tokens[1]})
    averaged.load_state_dict(masked.state_dict())
    superpixels = Superpixels.from_region_maps([region_map] * 2, [GRID] * 2, mask_size=None)
    assert torch.allclose(masked(features, superpixels).tokens, averaged(features).tokens, atol=1e-5)


@pytest.mark.parametrize("tokens", [(3, 2), (4, 3), (5, 4)])
def test_avg_pool_is_adaptive_average_pooling_of_the_valid_rectangle(tokens):
    projector = build("avg_pool", {"tokens_h": tokens[0], "tokens_w": tokens[1]})
    patches = torch.randn(1, 24, C)
    valid = torch.zeros(6, 4, dtype=torch.bool)
    valid[:5, :3] = True
    image = patches.view(1, 6, 4, C)[:, :5, :3].permute(0, 3, 1, 2)
    pooled = torch.nn.functional.adaptive_avg_pool2d(image, tokens).flatten(2).transpose(1, 2)
    result = projector(PatchFeatures(patches, [GRID], valid.view(1, 24)))
    assert torch.allclose(result.tokens, projector.head(pooled), atol=1e-5)


def test_untrained_svp_without_sspe_is_mask_pool():
    svp = build_projector("svp", vision_dim=C, llm_dim=D, grid=GRID, sspe="off")
    rival = build_projector("mask_pool", vision_dim=C, llm_dim=D, grid=GRID)
    rival.head.load_state_dict(svp.head.state_dict())
    assert torch.allclose(svp(*batch()).tokens, rival(*batch()).tokens, atol=1e-6)


def test_an_sspe_that_starts_at_zero_changes_nothing_yet_and_can_learn():
    svp = build_projector("svp", vision_dim=C, llm_dim=D, grid=GRID, sspe_start="zero", mask_size=8)
    rival = build_projector("mask_pool", vision_dim=C, llm_dim=D, grid=GRID)
    rival.head.load_state_dict(svp.head.state_dict())
    tokens = svp(*batch()).tokens
    assert torch.allclose(tokens, rival(*batch()).tokens, atol=1e-6)
    tokens.square().sum().backward()
    assert svp.sspe_to_llm.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="sspe_start"):
        build_projector("svp", vision_dim=C, llm_dim=D, grid=GRID, sspe_start="off")


def test_token_std_sets_the_scale():
    projector = build_projector("mlp", vision_dim=C, llm_dim=D, grid=GRID, token_std=0.07)
    assert projector(*batch()).packed()[0].std().item() == pytest.approx(0.07, rel=0.05)


def test_missing_and_misfitting_inputs_are_explained():
    features, superpixels = batch()
    svp = build("svp", SMALL["svp"])
    assert svp.mask_size == (8, 8) and build("mask_pool", {}).mask_size is None
    with pytest.raises(ValueError, match="'svp' needs superpixels and masks"):
        svp(features)
    with pytest.raises(ValueError, match="'svp' needs masks"):
        svp(features, replace(superpixels, masks=None))
    with pytest.raises(ValueError, match=r"\(2, 6, 20\).*N = 24"):
        svp(features, replace(superpixels, weights=superpixels.weights[..., :20]))
    with pytest.raises(ValueError, match="width 16, got 12"):
        svp(PatchFeatures(features.patches[..., :12], features.grids, features.valid), superpixels)
