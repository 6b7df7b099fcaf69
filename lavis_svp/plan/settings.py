"""The input of a plan: model and run from a project YAML or a model type, the kind of GPU, and lengths of the text."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavis_svp.common.options import plain
from lavis_svp.common.registry import unknown_name
from lavis_svp.datasets.layout import COUNTS
from lavis_svp.language.prompts import SEG_TOKEN, PromptOptions, conversation_styles
from lavis_svp.models.config import ModelOptions, parse_model_options
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.runners.deepspeed_config import read_config
from lavis_svp.runners.options import read_options
from lavis_svp.runners.project import build_config, read_project

PUBLISHED_SETS = {
    "refcoco_seg": ("refcoco", "unc"),
    "refcoco_plus_seg": ("refcoco+", "unc"),
    "refcocog_seg": ("refcocog", "umd"),
    "grefcoco_seg": ("grefcoco", "unc"),
}
"""Builder -> data set and usual partition in ``datasets/layout.py``."""

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
"""GLaMM's recipe: 2 images per GPU, 10 micro-batches per step, bf16, ZeRO-2 (from GranD-Pretrained)."""

RECIPE_STEPS = {"frozen": 3500, "lora": 1750, "full": 1750}
"""``language.tuning`` -> optimizer steps: the paper's first stage, and its second."""


@dataclass(frozen=True)
class TrainingSettings:
    """The training run."""

    images: int | None  # number of images of the training set; None = unknown
    data: str  # source of that number
    expressions: int  # sampled per image and step
    batch_size: int  # images per micro-batch and GPU
    accumulation: int  # micro-batches per optimizer step
    steps: int  # optimizer steps; 0 = unknown
    zero: int | None  # DeepSpeed's ZeRO stage; None = PyTorch's DDP
    dtype: str  # of the products, "bf16", "fp16" or "fp32"
    zero_options: Mapping[str, Any]  # ``zero_optimization`` of DeepSpeed's configuration

    def offloads(self, what: str) -> bool:
        """Whether ``"optimizer"`` or ``"param"`` is offloaded from the GPU."""
        device = (self.zero_options.get(f"offload_{what}") or {}).get("device", "none")
        return device != "none"


def from_project(cfg_path: str | Path, options: Sequence[str] = ()) -> tuple[ModelOptions, TrainingSettings]:
    """Read a project YAML with overrides, as for training.

    Raises:
        FileNotFoundError: there is no such YAML.
        ValueError: a key is unknown or a value impossible.
        KeyError: a name is unknown.
    """
    project = read_project(cfg_path, options)
    project.run.device = "cpu"  # a plan needs no GPU
    config = build_config(project)
    run = plain(config.run_cfg)
    return parse_model_options(config.model_cfg), training_settings(run, plain(config.datasets_cfg), Path(cfg_path))


def from_model_type(model_type: str) -> tuple[ModelOptions, TrainingSettings]:
    """A model type under GLaMM's recipe on RefCOCO, RefCOCO+ and RefCOCOg together; the paper seems to train so.

    Raises:
        UnknownNameError: there is no such type.
    """
    options = parse_model_options(OmegaConf.load(SvpRis.default_config_path(model_type)).model)
    run = {**RECIPE, "max_iters": RECIPE_STEPS[options.language.tuning]}
    return options, training_settings(run, {name: {} for name in RECIPE_SETS})


def training_settings(
    run: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]], project: Path | None = None
) -> TrainingSettings:
    """Read the training run off the ``run`` and ``datasets`` sections of a YAML.

    Args:
        run: the section; ``deepspeed_config`` counts if the runner is ``runner_deepspeed``.
        datasets: the sections by builder.
        project: the YAML's path, to resolve the relative path of a DeepSpeed JSON.

    Raises:
        DeepSpeedConfigError: ``deepspeed_config`` is not the path of a readable JSON file.
        ValueError: a value is impossible.
    """
    chosen = read_options(run)
    zero_options: Mapping[str, Any] = {}
    zero = None
    if chosen.runner == "runner_deepspeed":
        zero_options = read_config(run.get("deepspeed_config"), project).get("zero_optimization") or {}
        zero = int(zero_options.get("stage", 0))
    images, data = training_images(datasets)
    sampling = [(section or {}).get("sampling") or {} for section in datasets.values()]
    return TrainingSettings(
        images=images,
        data=data,
        expressions=max((int(one.get("expressions_per_image", 3)) for one in sampling), default=3),
        batch_size=chosen.batch_size_train,
        accumulation=chosen.accum_grad_iters,
        steps=chosen.max_iters,
        zero=zero,
        dtype=chosen.amp_dtype if chosen.amp else "fp32",
        zero_options=zero_options,
    )


def training_images(datasets: Mapping[str, Mapping[str, Any]]) -> tuple[int | None, str]:
    """Number of images of all training splits, and its source: published counts, or the YAML's own sizes."""
    total, sources = 0, []
    for builder, section in datasets.items():
        info = (section or {}).get("build_info") or {}
        train = (info.get("annotations") or {}).get("train") or {}
        splits = train.get("splits") or [train.get("split", "train")]  # key of expressions; of questions or captions
        if builder in PUBLISHED_SETS:
            name, partition = PUBLISHED_SETS[builder]
            published = COUNTS.get((name, info.get("split_by") or partition), {})
            sizes = {split: counts.images for split, counts in published.items() if counts.images is not None}
        else:
            sizes = dict.fromkeys(splits, 0) | dict(info["sizes"]) if info.get("sizes") else {}
        if any(split not in sizes for split in splits):
            return None, f"the size of {builder} is unknown here: set --images"
        number = sum(int(sizes[split]) for split in splits)
        total += number
        sources.append(f"{builder} {number:,}")
    return total or None, " + ".join(sources) or "no data set in the YAML: set --images"


_AMPERE = "NVIDIA A100 data sheet: BF16 tensor core, dense"
_HOPPER = "NVIDIA {} data sheet: 1,979 TFLOPS BF16 tensor core with sparsity, half of it dense"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str  # for ``--gpu``
    tflops: float  # peak of dense bf16 products with fp32 sums, 10^12 operations per second
    memory_gb: float  # memory in 10^9 bytes
    source: str  # of the numbers


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 312.0, 40.0, _AMPERE),
        Gpu("a100-80g", 312.0, 80.0, _AMPERE),
        Gpu("h100-80g", 989.5, 80.0, _HOPPER.format("H100 SXM")),
        Gpu("h200-141g", 989.5, 141.0, _HOPPER.format("H200 SXM")),
        Gpu("l40s-48g", 362.05, 48.0, "NVIDIA L40S data sheet: BFLOAT16 tensor core, dense"),
        Gpu("a40-48g", 149.7, 48.0, "NVIDIA A40 data sheet: BF16 tensor core with FP32 sums, dense"),
        Gpu("rtx4090-24g", 165.2, 24.0, "NVIDIA Ada white paper: BF16 tensor core with FP32 sums, dense"),
        Gpu("rtx3090-24g", 71.0, 24.0, "NVIDIA GA102 white paper: BF16 tensor core with FP32 sums, dense"),
    )
}


def get_gpu(name: str) -> Gpu:
    """Look up a kind of GPU by name; an UnknownNameError lists the known ones."""
    if name not in GPUS:
        raise unknown_name("kind of GPU", name, GPUS)
    return GPUS[name]


WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class TextLengths:
    """Numbers of text tokens."""

    prefix: int  # before the visual tokens, with begin-of-text
    question: int  # of a turn up to the answer
    answer: int  # of the answer, with end-of-text

    @property
    def turn(self) -> int:
        """Tokens of a question with its answer."""
        return self.question + self.answer


def count_tokens(text: str) -> int:
    """Count words and punctuation marks; English tokenizers of 32,000 entries or more differ by about a fifth."""
    return len(WORD_OR_MARK.findall(text.replace(SEG_TOKEN, "S")))


def text_lengths(prompt: PromptOptions, expression_words: int) -> TextLengths:
    """Estimate the lengths of a prompt's parts without a tokenizer, as means over its wordings."""
    style = conversation_styles.get(prompt.style)
    expression = " ".join(["word"] * expression_words)
    before, after = style.first_turn.split("{answer}")
    questions = [count_tokens(before.format(question=text.format(expression=expression))) for text in prompt.questions]
    answers = [count_tokens(text) + count_tokens(after) + 1 for text in prompt.answers]
    return TextLengths(
        prefix=count_tokens(style.before_image) + 1,
        question=round(statistics.fmean(questions)),
        answer=round(statistics.fmean(answers)),
    )
