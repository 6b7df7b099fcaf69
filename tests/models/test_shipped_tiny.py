"""The shipped weights themselves: what they say of themselves is true, and the default type loads them and segments."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lavis_svp.common.checkpoints import read_metadata
from lavis_svp.metrics.masks import iou, mask_counts
from lavis_svp.models.checkpoint import flat_options, only_training
from lavis_svp.models.config import parse_model_options
from lavis_svp.models.param_groups import part_of
from lavis_svp.zoo import list_shipped, verify_shipped
from lavis_svp.zoo.shipped import get_shipped, read_record, shipped_file

ROOT = Path(__file__).resolve().parents[2]
NAME = "svp_ris_tiny"
LIMIT = 60e6  # bytes
SEED = 1  # of a scene that no split holds: the demo's
TRAININGS = [
    path
    for folder in ("train", "ablation")
    for path in sorted((ROOT / "projects/svp" / folder).glob("*.yaml"))
    if OmegaConf.load(path).model.model_type == "tiny"
]


def test_the_file_is_that_of_its_record_and_small():
    assert verify_shipped(NAME) == []
    assert shipped_file(NAME).stat().st_size == read_record(NAME)["size"] < LIMIT


def test_no_frozen_weights_are_in_it_and_its_origin_is_named():
    from safetensors import safe_open

    with safe_open(shipped_file(NAME), "pt") as file:
        parts = {part_of(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert {"projector", "language", "seg_prompt", "mask_decoder"} <= parts and "frozen" not in parts
    said = read_metadata(shipped_file(NAME))
    assert {entry["name"] for entry in json.loads(said["origin"])} == set(get_shipped(NAME).needs)
    assert int(said["steps"]) > 0 and re.match(r"lavis-svp train ", said["command"])
    assert " /" not in said["command"] and "=/" not in said["command"]  # a path of a machine


def test_the_default_type_is_configured_as_it_was_trained():
    default = parse_model_options(OmegaConf.load(ROOT / "lavis_svp/configs/models/svp_ris_tiny.yaml").model)
    trained = parse_model_options(json.loads(read_metadata(shipped_file(NAME))["model"]))
    now, then = flat_options(default), flat_options(trained)
    assert {k: v for k, v in now.items() if not only_training(k)} == {
        k: v for k, v in then.items() if not only_training(k)
    }


@pytest.mark.slow
@torch.no_grad()
def test_it_segments_at_once():
    """The README's use on a built-in scene: most attribute expressions are answered with the right object."""
    from lavis.models import load_model_and_preprocess
    from PIL import Image

    from lavis_svp.datasets.refshapes.build import make_image
    from lavis_svp.datasets.refshapes.config import RefShapesConfig

    config = RefShapesConfig()
    scene = make_image(SEED, "test", 0, config)
    pixels, _ = scene.paint(SEED, config)
    model, vis, _ = load_model_and_preprocess("svp_ris", "tiny", is_eval=True)
    asked = [expression for expression in scene.expressions if expression.kind == "attribute"]
    samples = {
        "image": vis["eval"](Image.fromarray(pixels)).unsqueeze(0),
        "original_size": [pixels.shape[:2]],
        "text_input": [[expression.text for expression in asked]],
    }
    predictions = model.predict_masks(samples)[0]
    scores = [
        iou(counts.intersection, counts.union)
        for counts in (
            mask_counts(prediction.mask, scene.scene.masks[expression.target])
            for prediction, expression in zip(predictions, asked, strict=True)
        )
    ]
    assert len(scores) >= 2 and np.mean(scores) > 0.5, dict(zip([e.text for e in asked], scores, strict=True))


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_trainings_of_the_tiny_type_start_from_the_named_weights(path):
    assert OmegaConf.load(path).model.load_finetuned is False


@pytest.mark.parametrize("entry", list_shipped(), ids=lambda entry: entry.name)
def test_trainings_write_where_the_messages_say(entry):
    path = entry.train.split()[-1]
    project = OmegaConf.load(ROOT / path)
    default = OmegaConf.load(ROOT / f"lavis_svp/configs/models/svp_ris_{entry.model_type}.yaml").model
    assert entry.train == f"bash run_scripts/train.sh --cfg-path {path}"
    assert entry.checkpoint == project.run.output_dir and project.model.model_type == entry.model_type
    assert default.finetuned == entry.name
    parts = {default[part].name for part in ("language", "sam", "vision_encoder", "classifier") if part in default}
    assert parts == set(entry.needs)
