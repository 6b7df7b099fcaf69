"""The sections of gpu_check.py: each measures something on a device, and says what it must be.

On a CPU the models are small and the steps few; the code is the same.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from gpu_measure import Check, Section, Skip
from omegaconf import OmegaConf
from results import ROOT
from torch import Tensor, nn

import lavis_svp  # noqa: F401  (before LAVIS)
from lavis_svp.common.devices import wait_for
from lavis_svp.common.paths import cache_root
from lavis_svp.common.transfer import Packed, move_to_device
from lavis_svp.runners.training_log import peak_memory

PACKAGES = ("torch", "transformers", "salesforce-lavis", "peft", "deepspeed", "bitsandbytes", "timm", "numpy")
PROJECT = ROOT / "projects" / "svp" / "train" / "refshapes_tiny.yaml"
ZERO2 = ROOT / "projects" / "svp" / "deepspeed" / "zero2.json"
GIGABYTE = 1e9
SEED = 7  # of the drawn images
FP32_BOUND = 1e-3  # of fp32 features: largest difference, as a share of the largest value
LOGIT_BOUND = 1e-2  # of mask logits, which pass through more layers
SAME_PIXELS, SAME_MASKS = 0.98, 0.99  # shares of regions and masks that agree between devices in fp32
BF16_PIXELS, BF16_MASKS = 0.9, 0.9  # the same in bf16 with fp32; a bf16 score near a threshold chooses other masks
BF16_LOSS = 0.1  # mean difference of the losses in bf16 from those in fp32, as a share
MOST_WAITS = {"training step": 6, "prediction": 8}  # four, and one for each four of the 16 tokens
LARGE_REGIONS = (6, 7)  # rows and columns of superpixels: about the paper's 40

SECTIONS = {
    "environment": Section("versions, card, driver", 60),
    "parity": Section("the shipped model on the CPU and on the device", 150),
    "one_pass": Section("superpixels in one pass on the CPU and on the device", 40),
    "speed": Section("images a second: encoding, superpixels, inference", 120),
    "training": Section("steps of the tiny recipe in fp32 and bf16", 200),
    "waits": Section("how often the host waits for the device", 60),
    "large": Section("a step of the 7B model with random weights", 150),
    "zero2": Section("steps under DeepSpeed's ZeRO-2", 120),
}
"""By name, which is that of a function below; together at most 15 minutes."""


# ---------------------------------------------------------------- what is here


def environment(check: Check) -> None:
    """Versions of everything, and the card."""
    check.add("python", platform.python_version())
    check.add("system", f"{platform.system()} {platform.machine()}")
    for name in PACKAGES:
        try:
            check.add(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            check.add(name, "not installed")
    check.add("lavis-svp commit", _command("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown")
    check.add("CUDA of torch", torch.version.cuda or "none")
    if check.device.type == "cuda":
        card = torch.cuda.get_device_properties(check.device)
        check.add("card", card.name)
        check.add("compute capability", f"{card.major}.{card.minor}")
        check.add("memory", card.total_memory / GIGABYTE, "GB")
        check.add("free memory", torch.cuda.mem_get_info(check.device)[0] / GIGABYTE, "GB")
        check.add("bfloat16", torch.cuda.is_bf16_supported())
        check.add("driver", _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"))


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- the same results as on a CPU


def parity(check: Check) -> None:
    """Frozen features, superpixels, visual tokens and masks of the shipped model, on the CPU and on the device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here = _shipped_model(check, superpixels="sam")
    there = copy.deepcopy(here).to(check.device)
    samples = _samples(2 if check.small else 6, here.options.sam.side)
    check.say("encoding on both")
    with torch.no_grad():
        generator, configured = there.extractor.generator, there.extractor.generator.options
        generator.options = dataclasses.replace(configured, dtype="float32")
        vision = here.extractor(samples)
        other = there.extractor(move_to_device(samples, check.device))
        check.add("vision encoder", _difference(vision.patches.patches, other.patches.patches), at_most=FP32_BOUND)
        check.add("SAM encoder", _difference(vision.sam, other.sam), at_most=FP32_BOUND)
        check.add("superpixels in fp32 that agree", _same_maps(vision, other.region_maps), at_least=SAME_PIXELS)
        generator.options = dataclasses.replace(configured, dtype="bfloat16")
        half = generator(None, [other.sam_embedding(index) for index in range(len(other.geometry))])
        check.add("superpixels in bf16 that agree", _same_maps(vision, half), at_least=BF16_PIXELS)
        moved = Packed(vision).to(check.device).tree  # from here on the same input
        tokens = here.visual_tokens(vision).tokens
        check.add("projector", _difference(tokens, there.visual_tokens(moved).tokens), at_most=FP32_BOUND)
    fixed = {**samples, "region_map": vision.region_maps}
    masks = _masks(here, fixed)
    for name, at_least in (("fp32", SAME_MASKS), ("bf16", BF16_MASKS)):
        check.say(f"masks in {name}")
        found = _masks(there if name == "fp32" else there.to(torch.bfloat16), move_to_device(fixed, check.device))
        pairs = list(zip(masks, found, strict=True))
        if name == "fp32":
            worst = max(float(np.abs(a.logits - b.logits).max() / np.abs(a.logits).max()) for a, b in pairs)
            check.add("mask logits", worst, at_most=LOGIT_BOUND)
        overlap = [_iou(a.mask, b.mask) for a, b in pairs]
        bound = None if check.small and name == "bf16" else at_least
        check.add(f"masks in {name}, mean IoU with the CPU's", statistics.fmean(overlap), at_least=bound)
        check.add(f"answers in {name} that differ", sum(a.text != b.text for a, b in pairs), f"of {len(pairs)}")


def _shipped_model(check: Check, superpixels: str) -> Any:
    """The shipped model with these superpixels; on a CPU one of its kind for small images, which no weights fit."""
    from lavis_svp.models.svp_ris import SvpRis

    section = OmegaConf.load(SvpRis.default_config_path("tiny")).model
    section.superpixels.name = superpixels
    if check.small:
        small = {"vision_encoder": {"side": 112}, "sam": {"side": 128}, "superpixels": {"sam": {"points_per_side": 8}}}
        language = {"num_layers": 2, "max_new_tokens": 4}
        section = OmegaConf.merge(section, {"load_finetuned": False, "language": language, **small})
    torch.manual_seed(0)
    return SvpRis.from_config(section).eval()


def _samples(count: int, side: int, expressions: int = 2) -> dict[str, Any]:
    """RefShapes images with expressions of theirs; photos too, where they have been fetched."""
    from lavis_svp.common.images import read_image
    from lavis_svp.datasets.refshapes.build import make_image
    from lavis_svp.datasets.refshapes.config import RefShapesConfig
    from lavis_svp.processors.image import ImageEvalOptions, SvpImageEvalProcessor

    config, process = RefShapesConfig(), SvpImageEvalProcessor(ImageEvalOptions(side))
    photos = sorted((cache_root() / "data" / "images" / "photos").glob("*.[jp]*g"))[: count // 2]
    pixels = [read_image(path).pixels for path in photos]
    texts = [["the thing in the middle", "the largest thing"][:expressions] for _ in photos]
    for index in range(count - len(photos)):
        scene = make_image(SEED, "test", index, config)
        pixels.append(scene.paint(SEED, config)[0])
        texts.append([expression.text for expression in scene.expressions[:expressions]])
    return {
        "image": torch.stack([process.resized(image) for image in pixels]),  # (B, 3, S, S)
        "original_size": [image.shape[:2] for image in pixels],
        "text_input": texts,
    }


def _masks(model: Any, samples: dict[str, Any]) -> list[Any]:
    """Predictions of all expressions; the mask is that of its ``[SEG]``, wherever the answer has none."""
    written = [one for row in model.predict_masks(samples) for one in row]
    forced = [one for row in model.predict_masks(samples, mode="teacher_forced") for one in row]
    return [dataclasses.replace(two, text=one.text) for one, two in zip(written, forced, strict=True)]


def _difference(one: Tensor, two: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    one, two = one.detach().float().cpu(), two.detach().float().cpu()
    return float((one - two).abs().max() / one.abs().max()) if one.shape == two.shape else math.inf


def _same_maps(vision: Any, others: Sequence[Any]) -> float:
    """Mean over the images of :func:`_same_regions`."""
    return statistics.fmean(_same_regions(a.labels, b.labels) for a, b in zip(vision.region_maps, others, strict=True))


def _same_regions(one: np.ndarray, two: np.ndarray) -> float:
    """Mean over the pixels of the best IoU that their region has with one of the other map."""
    counts = np.zeros((one.max() + 2, two.max() + 2))
    np.add.at(counts, (one.ravel() + 1, two.ravel() + 1), 1)  # (R1 + 1, R2 + 1), row 0: in no region
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    return float((counts.sum(1) * (counts / np.maximum(union, 1)).max(1)).sum() / one.size)


def _iou(one: np.ndarray, two: np.ndarray) -> float:
    union = np.logical_or(one, two).sum()
    return float(np.logical_and(one, two).sum() / union) if union else 1.0


def one_pass(check: Check) -> None:
    """The boundary head on several images together, on the device, against one after another on the CPU; its speed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for side, count in ((128, 2),) if check.small else ((384, 8), (1024, 4)):
        _one_pass_at(check, side, count)


def _one_pass_at(check: Check, side: int, count: int) -> None:
    """The section's rows for so many images at one side of SAM."""
    from lavis_svp.superpixels.one_pass.generator import OnePassSuperpixels
    from lavis_svp.vision.geometry import geometry_of, image_pixels
    from lavis_svp.vision.sam_superpixels import SamImageSuperpixels

    samples, generator = _samples(count, side), OnePassSuperpixels()
    encoder = SamImageSuperpixels(side=side, device=str(check.device), encoder_dtype="float32", method="one_pass")
    images = image_pixels(samples["image"], geometry_of(side, samples["original_size"]))
    there = [encoder.embed(image) for image in images]
    here = [one._replace(embedding=one.embedding.cpu(), image=one.image.cpu()) for one in there]
    pairs = zip((generator.boundaries([one])[0] for one in here), generator.boundaries(there), strict=True)
    worst = max(float(np.abs(one.strength - other.strength).max()) for one, other in pairs)
    check.add(f"boundary strength at side {side}, largest difference", worst, at_most=FP32_BOUND)
    maps = zip(generator(None, here), generator(None, there), strict=True)
    same = statistics.fmean(_same_regions(one.labels, other.labels) for one, other in maps)
    check.add(f"superpixels at side {side} that agree", same, at_least=SAME_PIXELS)
    works = {"boundary head": lambda: generator.boundaries(there), "all of it": lambda: generator(None, there)}
    for name, work in works.items():
        check.add(f"{name} at side {side}", count / check.seconds(work, 1 if check.small else 5), "images/s")


# ---------------------------------------------------------------- images a second


def speed(check: Check) -> None:
    """Images a second of the frozen encoders, of superpixels, and of whole predictions."""
    model = _shipped_model(check, superpixels="sam").to(check.device)
    batch, repeats = (1, 1) if check.small else (16, 5)
    samples = move_to_device(_samples(batch, model.options.sam.side, expressions=1), check.device)
    extractor = model.extractor
    peak_memory(check.device)
    with torch.no_grad():
        vision = extractor(samples)
        fixed = {**samples, "region_map": vision.region_maps}
        embeddings = [vision.sam_embedding(index) for index in range(batch)]
        works: dict[str, Callable[[], Any]] = {
            "frozen encoders": lambda: extractor(fixed),
            "SAM superpixels": lambda: extractor.generator(None, embeddings),
            "prediction, superpixels known": lambda: model.predict_masks(fixed),
            "prediction, all of it": lambda: model.predict_masks(samples),
        }
        for name, work in works.items():
            check.add(name, batch / check.seconds(work, repeats), "images/s")
    if not check.small:
        check.add("peak memory", peak_memory(check.device), "GB")
        with torch.no_grad(), torch.autocast(check.device.type, dtype=torch.bfloat16):
            check.add("encoders in bf16", batch / check.seconds(works["frozen encoders"], repeats), "images/s")


# ---------------------------------------------------------------- training


def training(check: Check) -> None:
    """The tiny recipe in fp32 and in bf16: finite losses that fall, close to each other; time and memory."""
    losses = {name: _train(check, name, amp=name == "bf16") for name in ("fp32", "bf16")}
    half = len(losses["fp32"]) // 2
    pairs = list(zip(*(values[half:] for values in losses.values()), strict=True))
    apart = statistics.fmean(abs(a - b) for a, b in pairs) / statistics.fmean(a for a, _ in pairs)
    check.add("difference of the losses", apart, at_most=BF16_LOSS)
    if not check.small:
        _compare_with_plan(check)


def _train(check: Check, name: str, amp: bool) -> list[float]:
    """Do the steps; the losses of those after the alignment stage."""
    steps, aligned = (4, 1) if check.small else (30, 8)
    trainer = Trainer(check, name, steps, aligned, [f"run.amp={amp}", "run.amp_dtype=bf16", f"run.tf32={amp}"])
    losses, seconds = trainer.run(check)
    after = losses[aligned:]
    third = max(1, len(after) // 3)
    check.add(f"{name}: losses that are not finite", sum(not math.isfinite(one) for one in losses), at_most=0)
    bound = None if check.small else 1.0
    falls = statistics.fmean(after[-third:]) / statistics.fmean(after[:third])
    check.add(f"{name}: last losses over first ones", falls, at_most=bound)
    check.add(f"{name}: training", trainer.batch / statistics.median(seconds[aligned:]), "images/s")
    if not check.small:
        check.add(f"{name}: peak memory", trainer.peak, "GB")
    return after


class Trainer:
    """The tiny recipe on a few images, one optimizer step at a time.

    Args:
        check: where to run.
        name: of the run's folder.
        steps: how many it is going to do.
        aligned: how many of them align the projector alone.
        options: laid over the YAML.
    """

    def __init__(self, check: Check, name: str, steps: int, aligned: int, options: Sequence[str]) -> None:
        from lavis_svp.runners.data import train_loader
        from lavis_svp.runners.project import build_config, build_runner, read_project
        from lavis_svp.runners.training_log import TrainingMeter

        self.device, self.name, self.steps = check.device, name, steps
        peak_memory(self.device)
        project = read_project(PROJECT, [*_recipe(check, name, steps, aligned), *options])
        self.runner = runner = build_runner(build_config(project))
        self.batch = runner.options.batch_size_train
        self.meter = TrainingMeter(self.device)
        self.stepper = runner.make_stepper(self.meter)
        prepare, pins = runner.bare_model.batch_preparer(training=True), self.device.type == "cuda"
        loader = train_loader(runner.datasets, runner.order, runner.options, 0, pin_memory=pins, prepare=prepare)
        self.batches = iter(loader)
        runner.model.train()
        self.peak = 0.0

    def run(self, check: Check) -> tuple[list[float], list[float]]:
        """All steps: the loss and the seconds of each."""
        losses, seconds = [], []
        for step in range(self.steps):
            measured = self.step(step)
            losses.append(measured["loss"])
            seconds.append(measured["seconds"])
            check.say(f"{self.name}, step {step + 1} of {self.steps}: loss {losses[-1]:.3f}, {seconds[-1]:.2f} s")
        return losses, seconds

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step: its losses, and its ``seconds``."""
        start = time.perf_counter()
        self.stepper.step(step, self.batches)
        wait_for(self.device)
        seconds = time.perf_counter() - start
        measured = self.meter.collect(1)
        self.peak = max(self.peak, measured["memory_gb"])
        return {**measured, "seconds": seconds}


def _recipe(check: Check, name: str, steps: int, aligned: int) -> list[str]:
    """Options that shorten the tiny recipe, and on a CPU make its model small."""
    images, batch = (4, 2) if check.small else (48, 4)
    small = {
        "model.vision_encoder.side": 112,
        "model.sam.side": 128,
        "model.superpixels.sam.points_per_side": 8,
        "model.language.num_layers": 2,
        "datasets.refshapes_seg.vis_processor.train.image_size": 128,
        "datasets.refshapes_seg.vis_processor.eval.image_size": 128,
    }
    values = {
        "run.output_dir": check.folder / name,
        "run.device": check.device,
        "run.max_iters": steps,
        "run.iters_per_inner_epoch": steps,
        "run.warmup_steps": 2,
        "run.batch_size_train": batch,
        "run.log_to": "[]",
        "run.num_workers": 0,
        "model.auxiliary_losses.alignment_steps": aligned,
        "datasets.refshapes_seg.build_info.root": check.folder / "data",
        "datasets.refshapes_seg.build_info.sizes.train": images,
        "datasets.refshapes_seg.build_info.sizes.val": 0,
        "datasets.refshapes_seg.build_info.sizes.test": 2,
        **(small if check.small else {}),
    }
    return [f"{key}={value}" for key, value in values.items()]


def _compare_with_plan(check: Check) -> None:
    from lavis_svp.plan.settings import from_project

    check.add("peak memory that `plan` says", _planned(*from_project(PROJECT, _recipe(check, "plan", 30, 8))), "GB")


def _planned(options: Any, settings: Any) -> float:
    """Peak memory of one card that the plan of a run says, in GB."""
    from lavis_svp.plan.estimate import Assumptions, make_plan
    from lavis_svp.plan.settings import Gpu

    assumptions = Assumptions(tokens=math.prod(LARGE_REGIONS))
    return make_plan(options, settings, Gpu("this", 1.0, 1.0, ""), 1, assumptions).memory.peak / GIGABYTE


def zero2(check: Check) -> None:
    """Steps of the tiny recipe in bf16 under DeepSpeed's ZeRO-2, in a group of one process."""
    try:
        metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise Skip("deepspeed is not installed") from None
    options = ["run.runner=runner_deepspeed", f"run.deepspeed_config={ZERO2}", "run.amp=True", "run.amp_dtype=bf16"]
    trainer = Trainer(check, "zero2", 3, 1, options)
    losses, seconds = trainer.run(check)
    check.add("losses that are not finite", sum(not math.isfinite(one) for one in losses), at_most=0)
    check.add("training", trainer.batch / seconds[-1], "images/s")
    if not check.small:
        check.add("peak memory", trainer.peak, "GB")


# ---------------------------------------------------------------- waits of the host


def waits(check: Check) -> None:
    """How often the host waits for the device, as CUDA itself counts it."""
    if check.device.type != "cuda":
        raise Skip("only CUDA works behind the host's back; tests/models/test_host_waits.py counts on a CPU")
    trainer = Trainer(check, "waits", 8, 2, [])
    for step in range(4):
        trainer.step(step)
    count = _synchronisations(lambda: trainer.stepper.step(4, trainer.batches))
    check.add("waits of a training step", count, at_most=MOST_WAITS["training step"])
    model = trainer.runner.bare_model.eval()
    samples = _samples(2, model.options.sam.side)
    maps = model.extractor(move_to_device(samples, check.device)).region_maps
    batch = move_to_device(model.batch_preparer(training=False)({**samples, "region_map": maps}), check.device)
    model.predict_masks(batch)  # the first one makes constants
    count = _synchronisations(lambda: model.predict_masks(batch))
    check.add("waits of a prediction", count, at_most=MOST_WAITS["prediction"])


def _synchronisations(work: Callable[[], Any]) -> int:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(one.message) for one in seen)  # not the notice that the mode is new


# ---------------------------------------------------------------- the size of the paper's model


def large(check: Check) -> None:
    """Steps of the paper's second stage, LoRA on a 7B language model, with random weights: time and memory."""
    from lavis_svp.models.svp_ris import SvpRis
    from lavis_svp.plan.settings import training_settings

    torch.manual_seed(0)
    options = _large_options(check)
    batch = 2
    run = {"task": "referring_segmentation", "output_dir": "output", "batch_size_train": batch, "amp": True}
    planned = _planned(options, training_settings({**run, "max_iters": 1}, {}))
    check.add("peak memory that `plan` says", planned, "GB")
    if not check.small:
        free = torch.cuda.mem_get_info(check.device)[0] / GIGABYTE
        check.add("free memory", free, "GB")
        if free < planned:
            raise Skip(f"the plan says {planned:.0f} GB, but {free:.0f} GB are free")
        if not torch.cuda.is_bf16_supported():
            raise Skip("the card has no bfloat16")
    check.say("building it on the device, with random weights")
    model = _with_random_weights(SvpRis.skeleton(options), check.device)
    model.prompt_builder = _prompts(model)
    check.add("parameters", sum(one.numel() for one in model.parameters()) / 1e9, "10^9")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    prepare, losses = model.batch_preparer(training=True), []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        samples = move_to_device(prepare(_random_samples(batch, options.sam.side)), check.device)
        with torch.autocast(check.device.type, dtype=torch.bfloat16):
            loss = model(samples)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    model.train()
    seconds = check.seconds(step, 1 if check.small else 3)
    check.add("losses that are not finite", sum(not math.isfinite(one) for one in losses), at_most=0)
    check.add("training", batch / seconds, "images/s")
    if not check.small:
        check.add("peak memory", peak_memory(check.device), "GB")


def _large_options(check: Check) -> Any:
    """The paper's second stage with superpixels that need no weights; small on a CPU."""
    from transformers import Dinov2Config, LlamaConfig

    from lavis_svp.models.config import parse_model_options
    from lavis_svp.models.svp_ris import SvpRis

    section = OmegaConf.load(SvpRis.default_config_path("refcoco_vicuna7b")).model
    rows, columns = LARGE_REGIONS
    dtype = "float32" if check.small else "bfloat16"
    changes: dict[str, Any] = {
        "superpixels": {"name": "grid", "grid": {"rows": rows, "cols": columns}},
        **{part: {"dtype": dtype} for part in ("language", "vision_encoder", "sam")},
    }
    if check.small:
        llama, dino = check.folder / "llama", check.folder / "dinov2"
        LlamaConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=1024,
        ).save_pretrained(llama)  # fmt: skip
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        Dinov2Config(image_size=112, patch_size=14, **shape).save_pretrained(dino)
        changes["language"]["name"], changes["vision_encoder"]["name"] = str(llama), str(dino)
        changes["vision_encoder"]["side"] = 112
        changes["sam"] |= {"name": "sam_vit_b_01ec64.pth", "side": 128}
    return parse_model_options(OmegaConf.merge(section, changes))


@torch.no_grad()
def _with_random_weights(model: nn.Module, device: torch.device) -> Any:
    """A model from the meta device, on a device: random matrices, norms that start as the identity."""
    config = model.language.config
    base = float(getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"])
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "lora_B" not in name:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(1.0 if name.endswith(("weight", "lambda1")) and parameter.ndim == 1 else 0.0)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            width = 2 * len(buffer)
            buffer.copy_(base ** (-torch.arange(0, width, 2, device=device) / width))
        elif name.endswith(("std", "running_var")):
            buffer.fill_(0.25)
        elif buffer.is_floating_point():
            buffer.normal_()
        else:
            buffer.zero_()
    return model


def _prompts(model: Any) -> Any:
    """A prompt builder of the embedded tokenizer, whose ids are folded into the model's vocabulary."""
    from lavis_svp.language.causal_lm import load_tokenizer
    from lavis_svp.language.prompts import IGNORE, PromptBuilder, Turn

    language = model.language
    tokenizer, _ = load_tokenizer("smollm2_135m_instruct")
    own_seg = tokenizer.convert_tokens_to_ids("[SEG]")

    def folded(token: int) -> int:
        return token if token == IGNORE else language.seg_id if token == own_seg else token % language.seg_id

    class Folded(PromptBuilder):
        """Has the lengths of real texts."""

        def prefix_ids(self) -> list[int]:
            return [folded(token) for token in super().prefix_ids()]

        def segmentation_turn(self, *args: Any, **kwargs: Any) -> Turn:
            turn = super().segmentation_turn(*args, **kwargs)
            return dataclasses.replace(
                turn, ids=[folded(token) for token in turn.ids], labels=[folded(token) for token in turn.labels]
            )

    return Folded(tokenizer, model.options.prompt, language.options.max_turn_tokens)


def _random_samples(batch: int, side: int) -> dict[str, Any]:
    """Images of noise, each with three expressions and a mask for each."""
    size = (side * 3 // 4, side)
    image = torch.zeros(batch, 3, side, side, dtype=torch.uint8)
    image[:, :, : size[0]] = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    mask = np.zeros(size, np.uint8)
    mask[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1
    texts = ["the red cup on the left", "the person in front", "the dog behind the chair"]
    return {
        "image": image,
        "original_size": [size] * batch,
        "text_input": [texts] * batch,
        "masks": [[mask] * len(texts)] * batch,
        "has_target": [[True] * len(texts)] * batch,
    }
