"""The options of `svp` that an ablation turns: what each changes, and what it leaves."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lavis_svp.projectors import build_projector
from lavis_svp.projectors.geometry import mask_geometry

_spec = importlib.util.spec_from_file_location("test_base", Path(__file__).with_name("test_base.py"))
base = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(base)
C, D, GRID, SMALL, batch, build = base.C, base.D, base.GRID, base.SMALL, base.batch, base.build


def test_bbox_mlp_stands_where_sspe_stands():
    """An SVP whose SSPE is replaced by hand gives the same: everything behind it is shared."""
    features, superpixels = batch()
    boxed, full = build("svp", {**SMALL["svp"], "sspe": "bbox_mlp"}), build("svp", SMALL["svp"])
    shared = {key: value for key, value in boxed.state_dict().items() if not key.startswith("sspe.")}
    missing, unexpected = full.load_state_dict(shared, strict=False)
    assert not unexpected and all(key.startswith("sspe.") for key in missing)
    full.sspe = boxed.sspe
    assert torch.equal(full(features, superpixels).tokens, boxed(features, superpixels).tokens)


def test_bbox_mlp_sees_the_box_and_nothing_else_of_the_mask():
    features, superpixels = batch()
    svp = build("svp", {**SMALL["svp"], "sspe": "bbox_mlp"})
    x = mask_geometry(superpixels.masks).centre_and_size() * 2 - 1
    first, _, last = svp.sspe.mlp.layers
    expected = last(torch.nn.functional.gelu(first(x)))
    torch.testing.assert_close(svp.sspe(superpixels.masks), expected)
    ring = torch.ones(1, 1, 8, 8)
    ring[..., 2:6, 2:6] = 0
    torch.testing.assert_close(svp.sspe(ring), svp.sspe(torch.ones(1, 1, 8, 8)))


def test_bbox_mlp_can_start_at_zero():
    svp = build_projector("svp", vision_dim=C, llm_dim=D, grid=GRID, sspe="bbox_mlp", sspe_start="zero", mask_size=8)
    rival = build_projector("mask_pool", vision_dim=C, llm_dim=D, grid=GRID)
    rival.head.load_state_dict(svp.head.state_dict())
    torch.testing.assert_close(svp(*batch()).tokens, rival(*batch()).tokens)


@pytest.mark.parametrize(
    "options",
    [{"sspe_queries": 1}, {"sspe_blocks": 1}, {"sspe_heads": 1}, {"sspe_width": 8}, {"sspe_queries": 7}],
    ids=str,
)
def test_the_sizes_of_sspe_can_be_set(options):
    options = {**SMALL["svp"], **options}
    svp = build("svp", options)
    sspe = svp.sspe
    assert sspe.queries.shape == (options.get("sspe_queries", 4), options["sspe_width"])
    assert len(sspe.blocks) == options.get("sspe_blocks", 3)
    assert sspe.blocks[0].cross.heads == options.get("sspe_heads", 4)
    assert svp(*batch()).tokens.isfinite().all()


def test_an_sspe_that_nothing_receives_is_refused():
    for sspe in ("full", "bbox_mlp"):
        with pytest.raises(ValueError, match="sspe: off"):
            build("svp", {"sspe": sspe, "ssa": "off", "add_to_tokens": "none"})
    with pytest.raises(ValueError, match="full, bbox_mlp, off"):
        build("svp", {"sspe": "box"})
