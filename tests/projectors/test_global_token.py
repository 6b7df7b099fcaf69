"""The token of the whole image: what it is, and that nothing else changes with it."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lavis_svp.projectors import PatchFeatures, Superpixels, build_projector

_spec = importlib.util.spec_from_file_location("test_base", Path(__file__).with_name("test_base.py"))
base = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(base)
C, D, GRID, SMALL, batch, build = base.C, base.D, base.GRID, base.SMALL, base.batch, base.build

NAMES = ("mask_pool", "mask_pool_geometry", "svp")
CASES = [(name, token) for name in NAMES for token in ("mean", "cls")]
every_case = pytest.mark.parametrize(("name", "token"), CASES, ids=str)


def pair(name, token, **options):
    """The same projector with a global token and without."""
    options = {**SMALL.get(name, {}), **options}
    with_token, without = build(name, {**options, "global_token": token}), build(name, options, seed=1)
    without.load_state_dict(with_token.state_dict())
    return with_token, without


def inputs(**changes):
    features, superpixels = batch(**changes)
    summary = torch.randn(len(features.grids), C, generator=torch.Generator().manual_seed(1))
    return replace(features, summary=summary), superpixels


@every_case
@pytest.mark.parametrize("order", ["raster", "area", "random"])
def test_it_comes_first_and_leaves_the_other_tokens_alone(name, token, order):
    features, superpixels = inputs()
    projector, rival = pair(name, token, token_order=order)
    result, plain = projector(features, superpixels), rival(features, superpixels)
    assert torch.equal(result.valid[:, 1:], plain.valid) and result.valid[:, 0].all()
    torch.testing.assert_close(result.tokens[:, 1:], plain.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.assignment[:, 1:], plain.assignment)
    assert torch.equal(result.order[:, 1:], plain.order) and result.order[:, 0].eq(-1).all()
    even = features.valid / features.valid.sum(1, keepdim=True)
    torch.testing.assert_close(result.assignment[:, 0], even)
    counts = superpixels.valid.sum(1).tolist()
    assert result.valid.sum(1).tolist() == [n + 1 for n in counts]
    assert [projector.image_tokens(GRID, n) for n in counts] == [n + 1 for n in counts]
    assert projector.num_tokens(GRID) is None


@every_case
def test_it_is_alone_in_a_image_without_superpixels(name, token):
    features, superpixels = inputs()
    projector = pair(name, token)[0]
    emptied = Superpixels(superpixels.weights, superpixels.masks, superpixels.valid & torch.tensor([[False], [True]]))
    result = projector(features, emptied)
    assert (
        result.valid.sum(1).tolist() == [1, int(superpixels.valid[1].sum()) + 1]
        and projector.image_tokens(GRID, 0) == 1
    )
    if name != "svp":  # whose patches take their superpixels' positions
        torch.testing.assert_close(result.tokens[0, 0], projector(features, superpixels).tokens[0, 0])
    none = Superpixels(emptied.weights[:1, :0], emptied.masks[:1, :0], emptied.valid[:1, :0])
    one = PatchFeatures(features.patches[:1], features.grids[:1], features.valid[:1], summary=features.summary[:1])
    torch.testing.assert_close(projector(one, none).tokens[0, 0], result.tokens[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_mean_is_the_token_of_a_superpixel_that_covers_the_image(name):
    features = PatchFeatures.whole(torch.randn(1, 24, C), GRID)
    projector, rival = pair(name, "mean")
    none = Superpixels(torch.zeros(1, 0, 24), torch.zeros(1, 0, 8, 8), torch.zeros(1, 0, dtype=torch.bool))
    whole = Superpixels.from_masks([torch.ones(1, 12, 8)], [GRID], mask_size=8)
    if name == "svp":  # its patches take no position from a global token, but do from a superpixel
        projector.ssa = rival.ssa = None
    torch.testing.assert_close(projector(features, none).tokens, rival(features, whole).tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_norm", [False, True])
def test_cls_starts_from_the_encoders_summary(patch_norm):
    features, superpixels = inputs()
    projector = build("mask_pool", {"global_token": "cls", "patch_norm": patch_norm})
    expected = projector.head(projector.patch_norm(features.summary))
    torch.testing.assert_close(projector(features, superpixels).tokens[:, 0], expected)
    assert projector.requires == {"superpixels", "summary"}
    svp = build("svp", {**SMALL["svp"], "global_token": "cls"})
    assert svp.requires == {"superpixels", "masks", "summary"}
    with pytest.raises(ValueError, match="'mask_pool' needs summary.*from the vision encoder"):
        projector(replace(features, summary=None), superpixels)


@every_case
def test_padding_batch_mates_and_precision(name, token):
    features, superpixels = inputs()
    projector = pair(name, token)[0]
    together = projector(features, superpixels)
    for b, (h, w) in enumerate(features.grids):
        real = superpixels.valid[b]
        alone = projector(
            PatchFeatures(
                features.patches[b : b + 1, : h * w],
                [(h, w)],
                features.valid[b : b + 1, : h * w],
                summary=features.summary[b : b + 1],
            ),
            Superpixels(
                superpixels.weights[b : b + 1, real, : h * w],
                superpixels.masks[b : b + 1, real],
                superpixels.valid[b : b + 1, real],
            ),
        )
        torch.testing.assert_close(together.tokens[b, together.valid[b]], alone.tokens[0], atol=1e-5, rtol=1e-5)
    assert together.tokens[~together.valid].eq(0).all()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = projector(features, superpixels).tokens
    half = projector.to(torch.bfloat16)(features, superpixels).tokens
    for tokens in (mixed, half):
        assert (tokens.float() - together.tokens).norm() < 0.05 * together.tokens.norm()


@every_case
def test_every_parameter_gets_a_gradient_and_shapes_run_dry(name, token):
    projector = pair(name, token)[0]
    projector(*inputs()).tokens.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in projector.parameters()
    )
    features, superpixels = inputs()
    meta = PatchFeatures(
        features.patches.to("meta"), features.grids, features.valid.to("meta"), summary=features.summary.to("meta")
    )
    tokens = projector.to("meta")(meta, superpixels.to("meta")).tokens
    assert tokens.shape == (2, superpixels.valid.shape[1] + 1, D)


def test_an_unknown_one_is_named():
    with pytest.raises(ValueError, match="global_token must be one of none, mean, cls; got 'max'"):
        build_projector("mask_pool", vision_dim=C, llm_dim=D, grid=GRID, global_token="max")
