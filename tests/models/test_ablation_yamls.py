"""The ablation's YAMLs differ from the recipe of the tiny model in what they are named for, and in nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_svp import launch

ROOT = Path(__file__).resolve().parents[2]
ROWS = sorted((ROOT / "projects/svp/ablation").glob("*.yaml"))
CHANGES = {
    "full": {},
    "sspe_off": {"projector": {"sspe": False}},
    "sspe_bbox_mlp": {"projector": {"sspe": "bbox_mlp"}},
    "ssa_off": {"projector": {"ssa": False}},
    "ssa_no_shared_sspe": {"projector": {"ssa": "no_shared_sspe"}},
    "add_to_tokens_none": {"projector": {"add_to_tokens": "none"}},
    "add_to_tokens_before_mlp": {"projector": {"add_to_tokens": "before_mlp"}},
    "order_raster": {"projector": {"token_order": "raster"}, "aids": {"shuffle_tokens": False}},
    "order_area": {"projector": {"token_order": "area"}, "aids": {"shuffle_tokens": False}},
    "order_random": {"projector": {"token_order": "random"}, "aids": {"shuffle_tokens": False}},
    "positions_centroid": {"language": {"visual_positions": "centroid"}},
    "global_mean": {"projector": {"global_token": "mean"}},
    "global_cls": {"projector": {"global_token": "cls"}},
    "mask_pool": {"projector": {"name": "mask_pool"}},
    "mask_pool_geometry": {"projector": {"name": "mask_pool_geometry"}},
}


def resolved(path: Path) -> dict:
    return OmegaConf.to_container(launch.build_config(launch.read_project(path)).config, resolve=True)


def test_every_row_is_known():
    assert {path.stem for path in ROWS} == set(CHANGES)


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_a_row_changes_what_it_says(path):
    recipe, row = resolved(ROOT / "projects/svp/train/refshapes_tiny.yaml"), resolved(path)
    recipe["run"]["output_dir"] = f"output/svp/ablation/{path.stem}"
    recipe["model"] = OmegaConf.to_container(OmegaConf.merge(recipe["model"], CHANGES[path.stem]))
    assert row == recipe


def test_the_readme_has_every_row():
    text = (ROOT / "projects/svp/README.md").read_text(encoding="utf-8")
    assert [path.stem for path in ROWS if f"`{path.stem}`" not in text] == []
