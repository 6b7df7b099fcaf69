"""What every projector must hold, tested over the registry, so that a new projector is tested at once; the registry."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from projector_checks import CHECKS, batch_for, make_batch, make_projector

from lavis_svp.projectors import PatchFeatures, Superpixels, build_projector, list_projectors, register_projector
from lavis_svp.projectors.baselines.mlp import MlpProjector

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
        {"ssa": "none"},
        {"sspe": "none", "ssa_blocks": 2},
        {"add_to_tokens": "none", "patch_norm": True, "token_std": 0.1},
        {"sspe": "bbox_mlp"},
        {"sspe_queries": 1, "sspe_blocks": 1, "sspe_heads": 1},
    )
]
SUPERPIXEL_VARIANTS = [
    (name, options) for name, options in VARIANTS if name in ("mask_pool", "mask_pool_geometry", "svp")
]
VARIANTS += RIVALS
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
def test_every_check_passes(check, name, options):
    check(name, **options)


@every_projector
def test_the_device_is_not_waited_for(devices, name, options):
    """The forward pass needs no number from the device but for `dpc_knn`'s count, and no float64."""
    projector = make_projector(name, **options)
    features, superpixels = batch_for(projector)
    expected = projector(features, superpixels)
    with devices.LogicalCuda() as cuda, torch.no_grad():
        moved = replace(
            features,
            **{
                field: getattr(features, field).to("cuda:0")
                for field in ("patches", "valid", "levels", "cls_attention", "keys")
            },
        )
        given = superpixels.to("cuda:0")
        projector.to("cuda:0")
        with cuda.counting() as waits:
            result = projector(moved, given)
        allowed = 1 if options.get("kind") == "threshold" else 0
        assert len(waits.reads) == allowed and not waits.copies, waits.table()
        with cuda.counting() as waits:
            packed, counts = result.packed()
            assert result.counts == counts == expected.counts and result.on_host.order == expected.on_host.order
        known = allowed or (name, options) in SUPERPIXEL_VARIANTS
        assert len(waits.reads) == (0 if known else 1) and not waits.copies, waits.table()
        assert not cuda.doubles, "\n".join(map(str, cuda.doubles))
        cuda.check()
        torch.testing.assert_close(packed.cpu(), expected.packed()[0].detach(), atol=1e-5, rtol=1e-5)


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
    projector = build(name, options)
    features, superpixels = batch(grids=(GRID,), seed=seed)
    count = superpixels.valid.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[None]
    plain, shuffled = projector(features, superpixels), projector(features, superpixels.permuted(order))
    rank, shuffled_rank = plain.order[0].argsort(), order[0][shuffled.order[0]].argsort()  # token of each superpixel
    torch.testing.assert_close(plain.tokens[0, rank], shuffled.tokens[0, shuffled_rank], atol=1e-5, rtol=1e-5)
    centroids = (plain.assignment @ torch.stack(features.coordinates(), dim=2).float())[0] + 0.5  # (S, 2)
    row, column = centroids[:, 0].floor(), centroids[:, 1]
    same = (row[:, None] == row[None]) & ((column[:, None] - column[None]).abs() < 0.01)
    assume(int(same.sum()) == count)  # in one row and column the index decides
    assume((centroids[:, 0] - centroids[:, 0].round()).abs().min() > 0.01)  # on the border of two rows, rounding noise
    assert torch.equal(rank, shuffled_rank)


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


CASES = [
    ("avg_pool", {"tokens_h": 3, "tokens_w": 2}),
    ("c_abstractor", {"tokens_h": 3, "tokens_w": 2, "blocks": 2}),
    ("dpc_knn", {"count": 6}),
    ("ldp_v2", {"tokens_h": 3, "tokens_w": 2}),
    ("mlp", {}),
    ("patch_merger", {}),
    ("perceiver", {"num_queries": 5, "depth": 2, "heads": 2, "head_dim": 4}),
    ("pixel_shuffle", {"ratio": 2}),
    ("token_packer", {"scale": 2, "heads": 2}),
    ("vision_zip", {"dominant": 4, "contextual": 3}),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_equals_the_cropped_image(name, options):
    projector = make_projector(name, **options)
    sizes = [(6, 4), (4, 10), (8, 6)]
    features, _ = make_batch([(8, 6), (6, 10), (8, 6)], cut=[(2, 2), (2, 0), (0, 0)])
    packed, lengths = projector(features).packed()
    for b, ((height, width), tokens) in enumerate(zip(sizes, packed.split(lengths), strict=True)):
        real = features.valid[b]
        cropped = PatchFeatures(
            features.patches[b : b + 1, real],
            [(height, width)],
            torch.ones(1, height * width, dtype=torch.bool),
            cls_attention=features.cls_attention[b : b + 1, real],
            keys=features.keys[b : b + 1, real],
        )
        torch.testing.assert_close(projector(cropped).packed()[0], tokens, atol=1e-5, rtol=1e-5)


SIZES = {"vision_dim": 16, "llm_dim": 8, "grid": (6, 4)}


def test_names_build_projectors():
    assert {"avg_pool", "mask_pool", "mlp", "svp"} <= set(list_projectors())
    assert build_projector("svp", **SIZES).name == "svp"


def test_unknown_name_lists_the_known():
    with pytest.raises(KeyError, match="Did you mean 'svp'.*avg_pool, .*mask_pool, "):
        build_projector("svpp", **SIZES)


@pytest.mark.parametrize("name", list_projectors())
def test_unknown_option_is_named(name):
    with pytest.raises(ValueError, match="'no_such_option'"):
        build_projector(name, **SIZES, no_such_option=1)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="registered already"):
        register_projector("mlp")(MlpProjector)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svp", {"ssa": "half"}, "full, no_shared_sspe, none"),
        ("svp", {"sspe": None}, "full, bbox_mlp, none"),
        ("svp", {"add_to_tokens": "before"}, "after_mlp, before_mlp, none"),
        ("svp", {"ssa": "none", "add_to_tokens": "none"}, "sspe: none"),
        ("svp", {"mask_size": 0}, "mask_size"),
        ("svp", {"sspe_width": 30}, "divisible"),
        ("svp", {"sspe_queries": 0}, "sspe_queries must be a whole number of at least 1, got 0"),
        ("svp", {"ssa_heads": 0}, "ssa_heads"),
        ("svp", {"ssa_blocks": 0}, "ssa_blocks"),
        ("mask_pool_geometry", {"geometry_width": 0}, "geometry_width"),
        ("svp", {"ssa_heads": 5}, "ssa_heads"),
        ("avg_pool", {"tokens_h": 7}, "7x6 tokens from a 6x4"),
        ("mlp", {"token_std": 0.0}, "token_std"),
        ("c_abstractor", {"tokens_h": 7}, "7x6 tokens from a 6x4"),
        ("c_abstractor", {"tokens_w": 3, "blocks": 0}, "blocks"),
        ("ldp_v2", {"tokens_w": 5}, "6x5 tokens from a 6x4"),
        ("pixel_shuffle", {"ratio": 4}, "6x4 patch grid.*Nearest grids that do: 4x4 and 8x4"),
        ("pixel_shuffle", {"ratio": 0}, "ratio"),
        ("patch_merger", {"norm": "batch"}, "rms, layer"),
        ("patch_merger", {"merge_size": 0}, "merge_size"),
        ("patch_merger", {"eps": 0.0}, "eps"),
        ("perceiver", {"num_queries": 0}, "num_queries"),
        ("perceiver", {"depth": 0}, "depth"),
        ("token_packer", {"scale": 5}, "Nearest grids that do: 5x5 and 10x5"),
        ("token_packer", {"scale": 2, "num_levels": 0}, "num_levels"),
        ("dpc_knn", {"kind": "varying"}, "fixed, threshold"),
        ("dpc_knn", {"count": 0}, "count"),
        ("dpc_knn", {"threshold": 0.0}, "threshold"),
        ("vision_zip", {"dominant": 0}, "dominant"),
        ("vision_zip", {"contextual": -1}, "contextual"),
        ("avg_pool", {"tokens_w": 0}, "tokens_w"),
    ],
)
def test_impossible_option_is_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_projector(name, **SIZES, **options)


@pytest.mark.parametrize("name", ["pixel_shuffle", "token_packer", "patch_merger"])
def test_dinov2s_own_side_is_named_as_a_trap(name):
    with pytest.raises(ValueError, match="37x37.*36x36 and (38x38|40x40).*518 px = 37x37.*336 px = 24x24"):
        build_projector(name, vision_dim=16, llm_dim=8, grid=(37, 37))


def test_imports_neither_lavis_nor_transformers():
    code = "import lavis_svp.projectors, sys; print([m for m in ('lavis', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
