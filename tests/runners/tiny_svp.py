"""svp_ris with tiny random parts on a handful of RefShapes, trained by the command, as a process that can kill itself.

Called by tests in forked processes, see ``run_toy`` in conftest.py: ``main([folder, "--kill", "save:2@0", ...])``.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

STEPS = 4


def project(folder: Path, parts: dict[str, Path], data: Path) -> Path:
    """Write the project YAML: the tiny recipe without its alignment stage, with LoRA, two expressions per image."""
    from omegaconf import OmegaConf

    image = {"image_size": 128}
    content = {
        "model": {
            "arch": "svp_ris",
            "model_type": "tiny",
            "load_finetuned": False,
            "vision_encoder": {"name": str(parts["dinov2"]), "side": 84},
            "sam": {"side": 128, "max_masks_per_image": None},
            "superpixels": {"name": "grid", "grid": {"rows": 3, "cols": 3}},
            "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
            "language": {
                "name": str(parts["llama"]),
                "num_layers": None,
                "tuning": "lora",
                "train_embeddings": "all",
                "gradient_checkpointing": True,
            },
            "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
            "auxiliary_losses": {
                "grounding": 1.0,
                "word_alignment": 0.5,
                "alignment_steps": 0,
                "point_regression": 1.0,
            },
            "visual_tokens": {"shuffle": True},
            "cache_features": False,
        },
        "datasets": {
            "refshapes_seg": {
                "vis_processor": {
                    "train": {"name": "svp_image_train", **image},
                    "eval": {"name": "svp_image_eval", **image},
                },
                "sampling": {"expressions_per_image": 2, "max_expressions": 4, "instances": True},
                "build_info": {"root": str(data), "sizes": {"train": 8, "val": 2, "test": 2}},
            }
        },
        "run": {
            "runner": "runner_deepspeed",
            "task": "referring_segmentation",
            "output_dir": str(folder / "out"),
            "device": "cpu",
            "valid_splits": ["val"],
            "test_splits": ["test"],
            "batch_size_train": 1,
            "batch_size_eval": 1,
            "accum_grad_iters": 2,
            "max_iters": STEPS,
            "save_every": 1,
            "keep_checkpoints": 9,
            "eval_every": 2,
            "init_lr": 1.0e-3,
            "beta2": 0.95,
            "warmup_steps": 1,
            "grad_clip": 1.0,
            "log_freq": 1,
            "eval": {"mode": "teacher_forced", "num_visualise": 0},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"project_{os.getpid()}.yaml"
    OmegaConf.save(content, path)
    return path


def main(arguments: list[str], parts: dict[str, Path], data: Path) -> None:
    """Train as runner_deepspeed, or as the options say; with ``--kill event:n[@rank]`` until the n-th event."""
    from lavis_svp.cli import train
    from lavis_svp.tasks.referring_segmentation import ReferringSegmentationTask

    folder, *rest = arguments
    when, seen = None, Counter()
    if rest and rest[0] == "--kill":
        when, _, rank = rest[1].partition("@")
        when = when if not rank or rank == os.environ.get("RANK", "0") else None
        rest = rest[2:]

    def event(kind: str) -> None:
        seen[kind] += 1
        if when == f"{kind}:{seen[kind]}":
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(kind, function):
        def call(*args, **kwargs):
            event(kind)
            return function(*args, **kwargs)

        return call

    ReferringSegmentationTask.train_step = counted("micro", ReferringSegmentationTask.train_step)
    ReferringSegmentationTask._scored = counted("evaluation", ReferringSegmentationTask._scored)
    sync = os.fsync
    os.fsync = lambda handle: (sync(handle), event("save"))
    train.main(["--cfg-path", str(project(Path(folder), parts, data)), *(["--options", *rest] if rest else [])])
