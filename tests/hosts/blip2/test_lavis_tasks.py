"""LAVIS's own project files, tasks, data sets, processors and runner on a few images, with the model changed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

SIDE = 56


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images named as COCO's."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        pixels = np.full((60, 80, 3), 40 * index, np.uint8)
        pixels[10 : 20 + 10 * index, 20:50] = (255, 60 * index, 0)
        Image.fromarray(pixels).save(folder / f"COCO_val2014_{index:012d}.jpg")
    return folder


def stored(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def local(*paths: str) -> dict[str, object]:
    """A data set's annotations: LAVIS wants a URL, too, and takes a file that is there."""
    where = list(paths) if len(paths) > 1 else paths[0]
    return {"url": where, "storage": where}


def run_project(name: str, changes: dict, tmp_path: Path):
    """Build LAVIS's project YAML with our changes, as ``python -m lavis_svp.train`` does."""
    import lavis

    from lavis_svp.runners.project import build_config, build_runner, read_project

    project = read_project(Path(lavis.__file__).parent / "projects" / "blip2" / name)
    run = {
        "runner": "runner_base",
        "device": "cpu",
        "distributed": False,
        "amp": False,
        "num_workers": 0,
        "output_dir": str(tmp_path / "out"),
        "batch_size_train": 2,
        "batch_size_eval": 2,
        "num_beams": 2,
    }
    merged = OmegaConf.merge(project, changes, {"run": run})
    return build_runner(build_config(merged))


def documented_model() -> dict:
    """The ``model:`` section that docs/hosts.md shows."""
    text = (Path(__file__).parents[3] / "docs" / "hosts.md").read_text()
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))["model"]


def model_section(kind: str, model_type: str, folder: Path) -> dict:
    return {
        "arch": f"blip2_{kind}_svp",
        "model_type": model_type,
        "image_size": SIDE,
        "vit_precision": "fp32",
        "lm_precision": "fp32",
        f"{kind}_model": str(folder),
        "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
        "superpixels": {"name": "felzenszwalb", "side": SIDE},
    }


def test_caption_coco_ft_trains_evaluates_and_saves(tiny_vit, opt_folder, images, tmp_path):
    """LAVIS's captioning on OPT, encoder trained, without its metrics, whose reference files it would download."""
    names = sorted(path.name for path in images.iterdir())
    train = [{"image": n, "caption": f"image {i}", "image_id": n} for i, n in enumerate(names)]
    evaluated = [{"image": n, "caption": ["an image"]} for n in names]
    size = {"image_size": SIDE}
    changes = {
        "model": {**documented_model(), **model_section("opt", "pretrain_opt2.7b", opt_folder)},
        "datasets": {
            "coco_caption": {
                "vis_processor": {"train": size, "eval": size},
                "build_info": {
                    "annotations": {
                        "train": local(stored(tmp_path / "train.json", train)),
                        "val": local(stored(tmp_path / "val.json", evaluated)),
                        "test": local(stored(tmp_path / "test.json", evaluated[:2])),
                    },
                    "images": {"storage": str(images)},
                },
            }
        },
        "run": {
            "max_epoch": 1,
            "max_len": 6,
            "min_len": 2,
            "report_metric": False,
            "warmup_steps": 0,
            "valid_splits": [],
            "test_splits": ["val", "test"],
        },  # without a metric LAVIS finds no best epoch
    }
    runner = run_project("train/caption_coco_ft.yaml", changes, tmp_path)
    before = {name: p.detach().clone() for name, p in runner._model.named_parameters()}
    runner.train()
    moved = {n.split(".")[0] for n, p in runner._model.named_parameters() if not p.detach().equal(before[n])}
    assert moved == {"visual_encoder", "ln_vision", "opt_proj"}, "LAVIS's file sets freeze_vit: False"
    log = (tmp_path / "out" / "log.txt").read_text().splitlines()
    loss = next(json.loads(line)["train_loss"] for line in log if line.startswith('{"train_'))
    assert math.isfinite(float(loss))
    assert (tmp_path / "out" / "checkpoint_0.pth").is_file()
    captions = json.loads((tmp_path / "out" / "result" / "val_epoch0.json").read_text())
    assert sorted(row["image_id"] for row in captions) == [0, 1, 2, 3]
    assert all(isinstance(row["caption"], str) for row in captions)


def test_vqav2_zeroshot_answers_and_scores(tiny_vit, t5_folder, images, tmp_path):
    """LAVIS's VQA on T5, scored by the official evaluation in LAVIS."""
    names = sorted(path.name for path in images.iterdir())
    rows = [{"image": n, "question": f"what is {i}?", "question_id": i, "image_id": i} for i, n in enumerate(names)]
    answers = [
        {
            "question_id": i,
            "image_id": i,
            "answers": [{"answer": "red", "answer_id": k} for k in range(10)],
            "question_type": "what is",
            "answer_type": "other",
        }
        for i in range(len(names))
    ]
    questions = {"info": "", "task_type": "", "data_type": "", "data_subtype": "", "license": "", "questions": rows}
    files = (
        stored(tmp_path / "rows.json", rows),
        stored(tmp_path / "answer_list.json", ["red"]),
        stored(tmp_path / "questions.json", questions),
        stored(tmp_path / "answers.json", {**questions, "annotations": answers}),
    )
    changes = {
        "model": model_section("t5", "pretrain_flant5xl", t5_folder),
        "datasets": {
            "coco_vqa": {
                "vis_processor": {"eval": {"image_size": SIDE}},
                "build_info": {"annotations": {"val": local(*files)}, "images": {"storage": str(images)}},
            }
        },
        "run": {"max_len": 4},
    }
    runner = run_project("eval/vqav2_zeroshot_flant5xl_eval.yaml", changes, tmp_path)
    scores = runner.evaluate(skip_reload=True)
    assert 0 <= scores["val"]["agg_metrics"] <= 100
    written = json.loads((tmp_path / "out" / "result" / "val_vqa_result.json").read_text())
    assert sorted(row["question_id"] for row in written) == [0, 1, 2, 3]
    assert all(isinstance(row["answer"], str) for row in written)
