"""The options of `svp` that an ablation turns: what each changes, and what it leaves."""

import pytest
import torch
from projector_checks import GRID, LLM_DIM, VISION_DIM, batch_for, make_projector

from lavis_svp.projectors import build_projector
from lavis_svp.projectors.svp.geometry import mask_geometry

SMALL = {"sspe_width": 32, "mask_size": 8}
SIZES = {"vision_dim": VISION_DIM, "llm_dim": LLM_DIM, "grid": GRID}


def build(**options):
    return make_projector("svp", **{**SMALL, **options})


def assert_starts_as_mask_pool(svp):
    """A fresh svp gives the tokens of `mask_pool` with the same head."""
    rival = build_projector("mask_pool", **SIZES)
    rival.head.load_state_dict(svp.head.state_dict())
    tokens, expected = svp(*batch_for(svp)).tokens, rival(*batch_for(svp)).tokens
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-5)
    return tokens


@pytest.mark.parametrize(
    "options", [{"sspe": "none"}, {"sspe_start": "zero"}, {"sspe_start": "zero", "sspe": "bbox_mlp"}], ids=str
)
def test_training_starts_at_mask_pool(options):
    svp = build_projector("svp", **SIZES, **SMALL, **options)
    assert_starts_as_mask_pool(svp).square().sum().backward()
    assert svp.sspe is None or svp.sspe_to_llm.weight.grad.abs().sum() > 0  # it can learn


def test_bbox_mlp_stands_where_sspe_stands():
    """An SVP whose SSPE is replaced by hand gives the same: everything behind it is shared."""
    boxed, full = build(sspe="bbox_mlp"), build()
    features, superpixels = batch_for(full)
    shared = {key: value for key, value in boxed.state_dict().items() if not key.startswith("sspe.")}
    missing, unexpected = full.load_state_dict(shared, strict=False)
    assert not unexpected and all(key.startswith("sspe.") for key in missing)
    full.sspe = boxed.sspe
    assert torch.equal(full(features, superpixels).tokens, boxed(features, superpixels).tokens)


def test_bbox_mlp_sees_the_box_and_nothing_else_of_the_mask():
    svp = build(sspe="bbox_mlp")
    _, superpixels = batch_for(svp)
    x = mask_geometry(superpixels.masks).centre_and_size() * 2 - 1
    first, _, last = svp.sspe.mlp.layers
    expected = last(torch.nn.functional.gelu(first(x)))
    torch.testing.assert_close(svp.sspe(superpixels.masks), expected)
    ring = torch.ones(1, 1, 8, 8)
    ring[..., 2:6, 2:6] = 0
    torch.testing.assert_close(svp.sspe(ring), svp.sspe(torch.ones(1, 1, 8, 8)))


@pytest.mark.parametrize(
    "options",
    [{"sspe_queries": 1}, {"sspe_blocks": 1}, {"sspe_heads": 1}, {"sspe_width": 8}, {"sspe_queries": 7}],
    ids=str,
)
def test_the_sizes_of_sspe_can_be_set(options):
    svp = build(**options)
    sspe = svp.sspe
    assert sspe.queries.shape == (options.get("sspe_queries", 4), options.get("sspe_width", 32))
    assert len(sspe.blocks) == options.get("sspe_blocks", 3)
    assert sspe.blocks[0].cross.heads == options.get("sspe_heads", 4)
    assert svp(*batch_for(svp)).tokens.isfinite().all()


def test_an_sspe_that_nothing_receives_is_refused():
    for sspe in ("full", "bbox_mlp"):
        with pytest.raises(ValueError, match="sspe: none"):
            build(sspe=sspe, ssa="none", add_to_tokens="none")


@pytest.mark.parametrize(("spelling", "meaning"), [(True, "full"), (False, "none"), ("off", "none"), ("none", "none")])
def test_yaml_spellings_of_on_and_off(spelling, meaning):
    options = build_projector("svp", **SIZES, ssa=spelling, sspe=spelling).options
    assert (options.ssa, options.sspe) == (meaning, meaning)


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("token_order", "raster", "area"),
        ("global_token", "none", "mean"),
        ("sspe_merge", "concat", "mean"),
        ("sspe_attend", "inside", "all"),
        ("sspe_self_attention", False, True),
    ],
)
def test_removed_options_load_at_their_defaults_only(key, neutral, other):
    with pytest.warns(FutureWarning, match=key):
        assert build_projector("svp", **SIZES, **{key: neutral}).options == build_projector("svp", **SIZES).options
    with pytest.raises(ValueError, match=f"{key}.*removed"):
        build_projector("svp", **SIZES, **{key: other})
