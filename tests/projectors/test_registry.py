"""Building by name: unknown names, unknown and impossible options."""

import subprocess
import sys

import pytest

from lavis_svp.projectors import build_projector, list_projectors, register_projector
from lavis_svp.projectors.mlp import MlpProjector

SIZES = {"vision_dim": 16, "llm_dim": 8, "grid": (6, 4)}


def test_the_first_four_are_there():
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
        ("svp", {"ssa": "half"}, "full, no_shared_sspe, off"),
        ("svp", {"sspe": None}, "full, bbox_mlp, off"),
        ("svp", {"add_to_tokens": "before"}, "after_mlp, before_mlp, none"),
        ("svp", {"ssa": "off", "add_to_tokens": "none"}, "sspe: off"),
        ("svp", {"token_order": "size"}, "raster, area, given"),
        ("svp", {"mask_size": 0}, "mask_size"),
        ("svp", {"sspe_width": 30}, "divisible"),
        ("svp", {"ssa_heads": 5}, "ssa_heads"),
        ("mask_pool", {"token_order": "size"}, "raster, area, given"),
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
    ],
)
def test_impossible_option_is_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_projector(name, **SIZES, **options)


@pytest.mark.parametrize(("given", "meant"), [(True, "full"), (False, "off")])
def test_yaml_booleans_stand_for_full_and_off(given, meant):
    options = build_projector("svp", **SIZES, ssa=given, sspe=given).options
    assert (options.ssa, options.sspe) == (meant, meant)


@pytest.mark.parametrize("name", ["pixel_shuffle", "token_packer", "patch_merger"])
def test_dinov2s_own_side_is_named_as_a_trap(name):
    with pytest.raises(ValueError, match="37x37.*36x36 and (38x38|40x40).*518 px = 37x37.*336 px = 24x24"):
        build_projector(name, vision_dim=16, llm_dim=8, grid=(37, 37))


def test_imports_neither_lavis_nor_transformers():
    code = "import lavis_svp.projectors, sys; print([m for m in ('lavis', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
