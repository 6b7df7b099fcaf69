"""What a plan is made for: read off a project YAML, or GLaMM's recipe for a model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavis_svp import launch
from lavis_svp.common.options import plain
from lavis_svp.datasets.published import COUNTS
from lavis_svp.models.options import ModelOptions, parse_model_options
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.runners.deepspeed_config import read_config
from lavis_svp.runners.run_options import read_options

PUBLISHED_SETS = {
    "refcoco_seg": ("refcoco", "unc"),
    "refcoco_plus_seg": ("refcoco+", "unc"),
    "refcocog_seg": ("refcocog", "umd"),
    "grefcoco_seg": ("grefcoco", "unc"),
}
"""Builder -> data set and usual partition in ``datasets/published.py``."""

RECIPE_SETS = ("refcoco_seg", "refcoco_plus_seg", "refcocog_seg")
RECIPE = {
    "task": "referring_segmentation",
    "output_dir": "output",
    "batch_size_train": 2,
    "accum_grad_iters": 10,
    "amp": True,
    "runner": "runner_deepspeed",
    "deepspeed_config": {"zero_optimization": {"stage": 2}},
}
"""GLaMM's: 2 images a GPU, 10 micro-batches a step, bf16, ZeRO-2 (referring segmentation from GranD-Pretrained)."""

RECIPE_STEPS = {"frozen": 3500, "lora": 1750, "full": 1750}
"""Optimizer steps by what of the language model trains: the paper's first and second stage."""


@dataclass(frozen=True)
class TrainingSettings:
    """The training run.

    Args:
        images: of the training set; None = not known.
        data: where that number comes from.
        expressions: of an image, drawn at a time.
        batch_size: images a micro-batch and GPU.
        accumulation: micro-batches an optimizer step.
        steps: optimizer steps; 0 = not said.
        zero: DeepSpeed's ZeRO stage; None = PyTorch's DDP.
        dtype: "bf16", "fp16" or "fp32", of the products.
        zero_options: ``zero_optimization`` of DeepSpeed's configuration.
    """

    images: int | None
    data: str
    expressions: int
    batch_size: int
    accumulation: int
    steps: int
    zero: int | None
    dtype: str
    zero_options: Mapping[str, Any]

    def offloads(self, what: str) -> bool:
        """Whether ``"optimizer"`` or ``"param"`` is kept off the GPU."""
        device = (self.zero_options.get(f"offload_{what}") or {}).get("device", "none")
        return device != "none"


def from_project(cfg_path: str | Path, options: list[str]) -> tuple[ModelOptions, TrainingSettings]:
    """Read a project YAML.

    Args:
        cfg_path: as for training.
        options: overrides, as for training.

    Raises:
        FileNotFoundError: no such YAML.
        ValueError: an unknown key or an impossible value.
        KeyError: an unknown name.
    """
    project = launch.read_project(cfg_path, options)
    project.run.device = "cpu"  # the plan needs none of the GPUs that it plans for
    config = launch.build_config(project)
    run = plain(config.run_cfg)
    return parse_model_options(config.model_cfg), training_settings(run, plain(config.datasets_cfg), Path(cfg_path))


def from_model_type(model_type: str) -> tuple[ModelOptions, TrainingSettings]:
    """A model type under GLaMM's recipe on RefCOCO, RefCOCO+ and RefCOCOg together, as the paper (inferred) trains.

    Raises:
        UnknownNameError: no such type.
    """
    options = parse_model_options(OmegaConf.load(SvpRis.default_config_path(model_type)).model)
    run = {**RECIPE, "max_iters": RECIPE_STEPS[options.language.tuning]}
    return options, training_settings(run, {name: {} for name in RECIPE_SETS})


def training_settings(
    run: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]], project: Path | None = None
) -> TrainingSettings:
    """Bring the ``run`` and ``datasets`` sections of a YAML together.

    Args:
        run: the section; ``deepspeed_config`` counts if the runner is ``runner_deepspeed``.
        datasets: the sections by builder.
        project: the YAML's path, for the relative path of a DeepSpeed JSON.

    Raises:
        DeepSpeedConfigError: ``deepspeed_config`` names no JSON file, or cannot be read.
        ValueError: an impossible value.
    """
    chosen = read_options(run)
    zero_options: Mapping[str, Any] = {}
    zero = None
    if chosen.runner == "runner_deepspeed":
        zero_options = read_config(run.get("deepspeed_config"), project).get("zero_optimization") or {}
        zero = int(zero_options.get("stage", 0))
    images, data = training_images(datasets)
    drawing = [(section or {}).get("drawing") or {} for section in datasets.values()]
    return TrainingSettings(
        images=images,
        data=data,
        expressions=max((int(d.get("expressions_per_image", 3)) for d in drawing), default=3),
        batch_size=chosen.batch_size_train,
        accumulation=chosen.accum_grad_iters,
        steps=chosen.max_iters,
        zero=zero,
        dtype=chosen.amp_dtype if chosen.amp else "fp32",
        zero_options=zero_options,
    )


def training_images(datasets: Mapping[str, Mapping[str, Any]]) -> tuple[int | None, str]:
    """Images of the training splits together, from published counts or the YAML's own sizes, and where from."""
    total, sources = 0, []
    for builder, section in datasets.items():
        info = (section or {}).get("build_info") or {}
        train = (info.get("annotations") or {}).get("train") or {}
        splits = train.get("splits") or [train.get("split", "train")]  # of expressions; of questions or captions
        number = None
        if builder in PUBLISHED_SETS:
            name, partition = PUBLISHED_SETS[builder]
            counts = COUNTS.get((name, info.get("split_by") or partition), {})
            numbers = [counts[split].images if split in counts else None for split in splits]
            number = sum(numbers) if None not in numbers else None  # type: ignore[arg-type]  # no None is left
        elif info.get("sizes"):
            number = sum(int(info["sizes"].get(split, 0)) for split in splits)
        if number is None:
            return None, f"the size of {builder} is not known here: give --images"
        total += number
        sources.append(f"{builder} {number:,}")
    return total or None, " + ".join(sources) or "no data set in the YAML: give --images"
