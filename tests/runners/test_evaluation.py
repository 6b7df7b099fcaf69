"""Evaluations through the runner, whose loader prepares the batches: nothing that a task reads of them is missing."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from lavis_svp.runners.project import build_config, build_runner


def run_evaluation(tiny_parts, folder, dataset, task, evaluation, cache_features):
    """Evaluate an untrained model on a few images; its metrics and the summary's JSON."""
    image = {"name": "svp_image_eval", "image_size": 128}
    content = {
        "model": {
            "arch": "svp_ris",
            "model_type": "tiny",
            "load_finetuned": False,
            "vision_encoder": {"name": str(tiny_parts["dinov2"]), "side": 84},
            "sam": {"side": 128},
            "superpixels": {"name": "grid", "grid": {"rows": 3, "cols": 3}},
            "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
            "language": {"name": str(tiny_parts["llama"]), "num_layers": None},
            "cache_features": cache_features,
        },
        "datasets": {
            dataset: {
                "vis_processor": {"train": {**image, "name": "svp_image_train"}, "eval": image},
                "build_info": {"root": str(folder / "data"), "sizes": {"train": 2, "val": 2, "test": 3}},
            }
        },
        "run": {
            "task": task,
            "output_dir": str(folder / "out"),
            "device": "cpu",
            "evaluate": True,
            "distributed": False,
            "test_splits": ["test"],
            "batch_size_eval": 2,
            "eval": evaluation,
        },
    }
    logs = build_runner(build_config(OmegaConf.create(content))).train()
    (summary,) = (folder / "out").rglob("*.summary.json")
    return logs["test"], json.loads(summary.read_text())


@pytest.mark.parametrize("cache_features", [False, True])
def test_the_blind_baseline_gets_other_images(tiny_parts, own_cache, tmp_path, cache_features):
    scores, _ = run_evaluation(tiny_parts, tmp_path, "refshapes_vqa", "svp_vqa", {"blind": True}, cache_features)
    assert {"agg_metrics", "blind"} <= set(scores)


@pytest.mark.parametrize("cache_features", [False, True])
def test_a_summary_says_whether_its_times_hold_the_frozen_encoders(tiny_parts, own_cache, tmp_path, cache_features):
    evaluation = {"mode": "both", "num_visualise": 1}
    _, summary = run_evaluation(
        tiny_parts, tmp_path, "refshapes_seg", "referring_segmentation", evaluation, cache_features
    )
    assert summary["run"]["times_exclude_frozen_encoders"] == cache_features
