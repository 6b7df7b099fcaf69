"""Rows of the ablation and the comparison, and the long training, differ from the tiny model's recipe as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_svp.runners.project import build_config, read_project

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ablation", "comparison")
ROWS = [path for folder in FOLDERS for path in sorted((ROOT / "projects/svp" / folder).glob("*.yaml"))]
SHORTER = {
    "ablation": {"min_lr": 2.0e-5, "max_iters": 700, "eval": {"mode": "generative", "num_visualise": 12}},
    "comparison": {"min_lr": 2.0e-5, "max_iters": 1000},
}
ABLATION = {
    "full": {},
    "sspe_off": {"projector": {"sspe": "none"}},
    "sspe_bbox_mlp": {"projector": {"sspe": "bbox_mlp"}},
    "ssa_off": {"projector": {"ssa": "none"}},
    "ssa_no_shared_sspe": {"projector": {"ssa": "no_shared_sspe"}},
    "add_to_tokens_none": {"projector": {"add_to_tokens": "none"}},
    "add_to_tokens_before_mlp": {"projector": {"add_to_tokens": "before_mlp"}},
    "mask_pool": {"projector": {"name": "mask_pool"}},
    "mask_pool_geometry": {"projector": {"name": "mask_pool_geometry"}},
}

MASKS = {"superpixels": {"name": "sam"}}  # every row has them, with which the tables were measured
PLACES = {"auxiliary_losses": {"place_alignment": 1.0}}  # short runs differ less with it
COMPARISON = {
    "svp": {},
    "svp_zero_start": {"projector": {"sspe_start": "zero"}},
    "svp_paper": {
        "vision_encoder": {"extra_channels": []},
        "seg_prompt": {"state_norm": "none", "pointer": False, "pointer_position": False},
        "losses": {"resolution": "original"},
        "auxiliary_losses": {
            "grounding": 0.0,
            "word_alignment": 0.0,
            "alignment_steps": 0,
            "point_regression": 0.0,
        },
        "visual_tokens": {"norm": False, "shuffle": False},
    },
    "mask_pool": {"projector": {"name": "mask_pool"}},
    "mask_pool_geometry": {"projector": {"name": "mask_pool_geometry"}},
    "avg_pool": {"projector": {"name": "avg_pool", "tokens_h": 5, "tokens_w": 4}},
    "token_packer": {"projector": {"name": "token_packer", "scale": 4}},
    "perceiver": {"projector": {"name": "perceiver", "num_queries": 20}},
    "dpc_knn": {"projector": {"name": "dpc_knn", "count": 20}},
    "mlp": {"projector": {"name": "mlp"}},
}
COMPARISON = {row: changes if row == "svp_paper" else changes | PLACES for row, changes in COMPARISON.items()}
CHANGES = {"ablation": ABLATION, "comparison": COMPARISON}


def resolved(path: Path) -> dict:
    return OmegaConf.to_container(build_config(read_project(path)).config, resolve=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_row_is_known(folder):
    assert {path.stem for path in ROWS if path.parent.name == folder} == set(CHANGES[folder])


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_row_changes_what_it_says(path):
    recipe, row = resolved(ROOT / "projects/svp/train/refshapes_tiny_long.yaml"), resolved(path)
    folder = path.parent.name
    recipe["run"] |= {**SHORTER[folder], "output_dir": f"output/svp/{folder}/{path.stem}"}
    recipe["model"] = OmegaConf.to_container(OmegaConf.merge(recipe["model"], MASKS, CHANGES[folder][path.stem]))
    assert row == recipe


def test_the_long_training_is_the_short_one_with_more_steps():
    short, long = (
        resolved(ROOT / f"projects/svp/train/{name}.yaml") for name in ("refshapes_tiny", "refshapes_tiny_long")
    )
    assert long["run"].pop("output_dir") == short["run"].pop("output_dir") + "_long"
    assert long["run"].pop("max_iters") == 4000 and short["run"].pop("max_iters") >= 1000
    assert long["run"].pop("min_lr") < short["run"].pop("min_lr")
    assert long["model"]["auxiliary_losses"].pop("place_alignment") == 0.0
    assert short["model"]["auxiliary_losses"].pop("place_alignment") == 1.0
    assert long == short


def test_the_readme_has_every_row():
    text = (ROOT / "projects/svp/README.md").read_text(encoding="utf-8")
    assert [path.stem for path in ROWS if f"`{path.stem}`" not in text] == []
