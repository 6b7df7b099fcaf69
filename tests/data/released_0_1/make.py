"""Writes this folder. RUNS ON THE OLD CODE ONLY: lavis-svp 0.1 at commit ccb73d7.

    git clone . /tmp/old && git -C /tmp/old checkout ccb73d7
    cd /tmp/old && PYTHONPATH=/tmp/old TINY_CACHE=XDG_CACHE_HOME_OF_A_TINY_RUN python PATH/TO/make.py   # all
    cd /tmp/old && PYTHONPATH=/tmp/old python PATH/TO/make.py --check    # computes all expected values again

It is kept to show where the files come from, and is never imported: tests read the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg", WANDB_MODE="disabled",
)  # fmt: skip
COMMIT = "ccb73d7"
OLD = Path.cwd()
HERE = Path(__file__).resolve().parent
WORK = Path("/tmp/released_0_1_work")  # its place is in no digest and no weight, only in the checkpoints' configuration
SIDE = 64  # of SAM's frame

# --------------------------------------------------------------------------- parts that stay outside of the fixtures


def make_parts(folder: Path) -> None:
    """The frozen parts, from seeds: as ``tiny_llama`` (tests/conftest.py) and ``tiny_parts`` (tests/models)."""
    import torch
    from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

    from lavis_svp import zoo

    tokenizer = AutoTokenizer.from_pretrained(zoo.fetch("smollm2_135m_instruct", progress=False))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "dinov2")


# --------------------------------------------------------------------------- inputs made by formulas


def pixels(number: int, height: int, width: int):
    """(H, W, 3) uint8 with some structure: a ramp, and two rectangles of plain colour."""
    import numpy as np

    y, x = np.mgrid[:height, :width]
    picture = np.stack([(3 * x + 50 * number) % 256, (5 * y + 2 * x) % 256, 0 * x + 90 + 60 * number], -1)
    picture = picture.astype(np.uint8)
    picture[height // 8 : height // 2, width // 8 : width // 2] = (220, 30 + 40 * number, 30)
    picture[height // 2 + 2 : -2, width // 2 + 2 : -2] = (20, 40, 200)
    return picture


def wave(*shape: int, step: float = 0.37):
    """A tensor of these sizes, by a formula: sin(step * index), in float32."""
    import numpy as np
    import torch

    return torch.from_numpy(np.sin(step * np.arange(int(np.prod(shape)))).astype(np.float32)).reshape(shape)


def batch():
    """Two pictures, of 24 x 32 and 32 x 32 pixels, with three expressions and one; one of them fits nothing."""
    import numpy as np
    import torch

    sizes, inside = [(24, 32), (32, 32)], [(48, 64), (64, 64)]
    image = torch.zeros(2, 4, SIDE, SIDE)
    masks = []
    for index, (height, width) in enumerate(inside):
        picture = torch.from_numpy(pixels(index, height, width)).permute(2, 0, 1).float() / 255
        image[index, :3, :height, :width] = picture
        image[index, 3, :height, :width] = 1
        mask = np.zeros(sizes[index], np.uint8)
        mask[3:12, 4:16] = 1
        masks.append(mask)
    return {
        "image": image,
        "original_size": sizes,
        "text_input": [["the red cup", "a cat", "the large blue star on the left"], ["the circle"]],
        "masks": [[masks[0], np.zeros_like(masks[0]), masks[0]], [masks[1]]],
        "has_target": [[True, False, True], [True]],
        "instances": [{"labels": m.astype(np.int32) - 1, "words": [["red", "cup"]]} for m in masks],
    }


# --------------------------------------------------------------------------- trainings


def project(name: str) -> dict:
    """The project YAML of one training."""
    image = {"image_size": SIDE}
    model = {
        "arch": "svp_ris",
        "model_type": "tiny",
        "load_finetuned": False,
        "vision_encoder": {"name": "parts/dinov2", "side": 56, "beside": ["colour"]},
        "sam": {"side": SIDE},
        "superpixels": {"name": "grid", "grid": {"rows": 3, "cols": 3}},
        "language": {"name": "parts/llama"},
    }
    if name == "full":  # the tiny recipe with all its aids; see svp_ris_tiny.yaml for what is not said here
        model["projector"] = {
            "name": "svp", "sspe_width": 8, "sspe_blocks": 1, "sspe_heads": 2, "sspe_ffn_ratio": 1, "ssa_ffn_ratio": 1,
            "mask_size": 8, "ssa_heads": 1,
        }  # fmt: skip
        model["language"] |= {"num_layers": 1, "tuning": "full", "train_embeddings": "added"}
        model["readout"] = {"pointer_dim": 8}
        model["aids"] = {"alignment_steps": 1}
        model["trainable"] = [
            "projector.*", "language.transformer.*", "!language.transformer.*.mlp.*", "language.added_*", "readout.*",
            "aids.*", "mask_head.mask_decoder.iou_token.weight",
        ]  # fmt: skip
        model["learning_rates"] = {"projector.sspe.*": 5.0e-4, "embeddings": 0.1}  # soon it says [SEG]
    else:  # the paper's form with LoRA
        model["projector"] = {"name": "mask_pool"}
        model["sam"] |= {"train_decoder": False, "max_masks_per_picture": None}
        model["language"] |= {
            "num_layers": None, "tuning": "lora", "train_embeddings": "added", "gradient_checkpointing": True,
            "lora": {"r": 2, "alpha": 4},
        }  # fmt: skip
        model["layout"] = "conversation"
        model["readout"] = {"state_norm": "none", "pointer": False, "pointer_position": False}
        model["aids"] = {
            "grounding": 0.0, "word_alignment": 0.0, "alignment_steps": 0, "point_regression": 0.0,
            "shuffle_tokens": False, "token_norm": False,
        }  # fmt: skip
        model["cache_frozen"] = False
        model["learning_rates"] = {"embeddings": 0.1}
        model["trainable"] = [
            "projector.*", "language.transformer.*lora_*", "language.added_*", "readout.*", "!readout.mlp.2.weight",
        ]  # fmt: skip
        model["vision_encoder"]["beside"] = []
    steps, save = (5, 3) if name == "full" else (3, 2)
    run = {
        "runner": "runner_deepspeed" if name == "deepspeed" else "runner_svp",
        "task": "referring_segmentation",
        "output_dir": str(WORK / "runs" / name),
        "device": "cpu",
        "seed": 42,
        "valid_splits": [],
        "test_splits": ["test"],
        "batch_size_train": 2,
        "batch_size_eval": 2,
        "accum_grad_iters": 2,
        "num_workers": 0,
        "max_iters": steps,
        "save_every": save,
        "keep_checkpoints": 9,
        "init_lr": 1.0e-3,
        "beta2": 0.95,
        "weight_decay": 0.01,
        "warmup_steps": 1,
        "lr_sched": "linear",
        "grad_clip": 1.0,
        "log_freq": 1,
        "log_to": [],
        "eval": {"mode": "both", "num_visualise": 0},
    }
    if name == "deepspeed":
        run["deepspeed_config"] = {"zero_optimization": {"stage": 2}}
    data = {
        "refshapes_seg": {
            "vis_processor": {
                "train": {"name": "svp_image_train", **image},
                "eval": {"name": "svp_image_eval", **image},
            },
            "drawing": {"expressions_per_picture": 2, "max_expressions": 4},
            "build_info": {"root": str(WORK / "data"), "sizes": {"train": 8, "val": 2, "test": 2}},
        }
    }
    return {"model": model, "datasets": data, "run": run}


RUNS = {"full": "checkpoint_3.pth", "lora": "checkpoint_2.pth", "deepspeed": "checkpoint_2.pth"}


def train_all() -> None:
    from omegaconf import OmegaConf

    for name, kept in RUNS.items():
        yaml = WORK / f"{name}.yaml"
        OmegaConf.save(project(name), yaml)
        command = [sys.executable, "-m", "lavis_svp.train", "--cfg-path", str(yaml)]
        subprocess.run(command, cwd=WORK, check=True)
        target = HERE / "runs" / name
        target.mkdir(parents=True)
        shutil.copy(yaml, target / "project.yaml")
        shutil.copy(WORK / "runs" / name / kept, target / kept)


def model_of(name: str):
    """The model of a run with its stored weights, by the public way: the configuration with ``finetuned``."""
    from lavis_svp import launch
    from lavis_svp.models.svp_ris import SvpRis

    here = HERE / "runs" / name
    weights = here / RUNS[name]
    options = ["model.load_finetuned=True", f"model.finetuned={weights}"]
    config = launch.build_config(launch.read_project(here / "project.yaml", options))
    return SvpRis.from_config(config.model_cfg), config


VOLATILE = ("_time_", "second", "memory", "_ms_")  # what the log says of this machine


def expect_run(name: str) -> tuple[dict, dict]:
    """(JSON facts, tensors) of a run: its log, what its checkpoint says of a batch, where its training ends."""
    import random

    import torch

    from lavis_svp.common.checkpoints import content_digest, read_checkpoint

    facts: dict = {}
    lines = [json.loads(line) for line in (WORK / "runs" / name / "log.txt").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not any(word in k for word in VOLATILE)} for line in lines]
    facts["train_log"] = [line for line in lines if "train_loss" in line]
    facts["test"] = [line for line in lines if any(key.startswith("test_") for key in line)]
    last = max((WORK / "runs" / name).glob("checkpoint_?.pth"))
    end = read_checkpoint(last)
    facts["last_step"] = end["iters"]
    facts["last_weights"] = {
        key: [float(value.double().sum()), float(value.double().norm())] for key, value in end["model"].items()
    }
    facts["last_weights_digest"] = content_digest(dict(sorted(end["model"].items())))
    stored = read_checkpoint(HERE / "runs" / name / RUNS[name])
    facts["checkpoint"] = {
        "keys": sorted(stored),
        "iters": stored["iters"],
        "shapes": {k: list(v.shape) for k, v in stored["model"].items()},
    }
    model, config = model_of(name)
    facts["model_section"] = json.loads(json.dumps(config.to_dict()["model"]))
    facts["model_section"]["finetuned"] = RUNS[name]
    facts["frozen_parts"] = {
        "vision_encoder": content_digest(model.frozen.vision_encoder.state_dict()),
        "sam_encoder": content_digest(model.frozen.sam_encoder.state_dict()),
        "embed_tokens": content_digest({"weight": model.language.embed_tokens.weight}),
    }
    facts["frozen_settings"] = model.frozen.settings()
    facts["superpixel_settings"] = model.frozen.generator.settings()
    model.eval()
    given = batch()
    random.seed(0)
    torch.manual_seed(0)
    with torch.no_grad():
        facts["losses"] = {key: float(value) for key, value in model(given).items() if key != "stats"}
    tensors = {}
    for mode in ("generative", "teacher_forced"):
        facts[mode] = []
        for row, predictions in enumerate(model.predict_masks(given, mode)):
            for column, one in enumerate(predictions):
                facts[mode].append(
                    {"text": one.text, "answered": one.answered, "score": one.score, "pick": one.pick,
                     "tokens": one.tokens, "area": int(one.mask.sum())}
                )  # fmt: skip
                if mode == "teacher_forced":
                    tensors[f"{name}.{row}.{column}"] = torch.from_numpy(one.logits).contiguous()
    tensors[f"{name}.visual_tokens"] = model.encode(given).visual.tokens.detach().contiguous()
    return facts, tensors


# --------------------------------------------------------------------------- projectors

DIMS = {"vision_dim": 16, "llm_dim": 8, "grid": (6, 6)}
PROJECTORS = {
    "svp": {"sspe_width": 16, "sspe_blocks": 1, "mask_size": 8, "ssa_heads": 2, "token_std": 0.1},
    "mask_pool": {"global_token": "mean"},
}


def projector_inputs(mask_size: int | None):
    import numpy as np

    from lavis_svp.projectors.structures import PatchFeatures, Superpixels
    from lavis_svp.superpixels import RegionMap

    y, x = np.mgrid[:24, :36]
    maps = [RegionMap.from_labels((y // 9) * 3 + x // 13), RegionMap.from_labels((x + y) // 20)]
    features = PatchFeatures.whole(wave(2, 36, DIMS["vision_dim"]), DIMS["grid"])
    return features, Superpixels.from_region_maps(maps, features.grids, mask_size=mask_size)


def make_projectors() -> None:
    import torch

    from lavis_svp.projectors import build_projector, save_projector

    for name, options in PROJECTORS.items():
        torch.manual_seed(0)
        projector = build_projector(name, **DIMS, **options)
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        save_projector(HERE / "projectors" / f"{name}.safetensors", projector)


def expect_projectors() -> tuple[dict, dict]:
    import torch

    from lavis_svp.projectors import load_projector

    tensors, facts = {}, {}
    for name in PROJECTORS:
        projector = load_projector(HERE / "projectors" / f"{name}.safetensors")
        with torch.no_grad():
            out = projector(*projector_inputs(getattr(projector, "mask_size", None)))
        tensors[f"projectors.{name}.tokens"] = out.tokens.contiguous()
        tensors[f"projectors.{name}.valid"] = out.valid.contiguous()
        tensors[f"projectors.{name}.order"] = out.order.contiguous()
        facts[name] = {"class": type(projector).__name__, "parameters": sum(p.numel() for p in projector.parameters())}
    return facts, tensors


# --------------------------------------------------------------------------- host

WORDS = "what is this ? and : which it red blue cup star the a of on left right".split()  # noqa: SIM905


def make_host() -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    from lavis_svp.hosts import swap_projector

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision, text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    model = LlavaForConditionalGeneration(config).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor = LlavaProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
    options = {"sspe_width": 16, "sspe_blocks": 1, "mask_size": 8, "ssa_heads": 1}
    model, processor = swap_projector(model, processor, "svp", superpixels="felzenszwalb", **options)
    with torch.no_grad():  # SSA starts as the identity, and pictures should change what is said
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.mul_(4.0)
    model.save_pretrained(HERE / "host_llava")
    processor.save_pretrained(HERE / "host_llava")


def expect_host() -> tuple[dict, dict]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import lavis_svp.hosts  # noqa: F401  (registers the classes)

    model = AutoModelForImageTextToText.from_pretrained(HERE / "host_llava").eval()
    processor = AutoProcessor.from_pretrained(HERE / "host_llava")
    prompts = ["what is <image> this ?", "<image> and <image> : which is it ?"]
    pictures = [pixels(number, 60, 50 + 15 * number) for number in range(3)]
    inputs = processor(text=prompts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        said = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    facts = {
        "class": type(model).__name__, "processor": type(processor).__name__, "prompts": prompts,
        "pictures": "pixels(number, 60, 50 + 15 * number) for number in range(3)", "padding_side": "right",
        "input_ids": inputs["input_ids"].tolist(), "input_keys": sorted(inputs),
        "generated": said[:, inputs["input_ids"].shape[1] :].tolist(),
    }  # fmt: skip
    real = inputs["attention_mask"].bool()
    return facts, {"host_llava.logits": logits[real].contiguous(), "host_llava.attention_mask": real.contiguous()}


# --------------------------------------------------------------------------- stores, caches, shards

GENERATORS = {"grid": {"rows": 2, "cols": 3}, "felzenszwalb": {"side": 48, "max_regions": 6}}


def make_stores() -> None:
    from PIL import Image

    from lavis_svp.datasets.pictures import read_pixels
    from lavis_svp.datasets.shards.__main__ import main as shards
    from lavis_svp.models.frozen_cache import FrozenCache
    from lavis_svp.models.prepare import FeatureWriter
    from lavis_svp.superpixels import build_superpixels
    from lavis_svp.superpixels.cache import SuperpixelCache

    pictures = HERE / "pictures"
    pictures.mkdir()
    for number, size in enumerate([(36, 48), (40, 40)]):
        Image.fromarray(pixels(number, *size)).save(pictures / f"{number}.png")
    lines = []
    for number, (height, width) in enumerate([(36, 48), (40, 40)]):
        y, x, bottom, right = height // 8, width // 8, height // 2, width // 2
        box = [x, y, right, y, right, bottom, x, bottom]
        named = {"segmentation": [box], "category": "cup", "attributes": ["red"]}
        other = [right + 2, bottom + 2, width - 2, bottom + 2, width - 2, height - 2, right + 2, height - 2]
        lines.append(
            {
                "image": f"{number}.png", "id": 7 + number, "split": ["train", "test"][number],
                "instances": [named, {"segmentation": [other], "category": "cup", "attributes": ["blue"]}],
                "expressions": [
                    {"text": "the red cup", "targets": [0], "kind": "attribute"},
                    {"text": "the right cup", "targets": [1]},
                    {"text": "the green star", "targets": [], "kind": "no_target"},
                ],
            }
        )  # fmt: skip
    (pictures / "expressions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stores = {
        name: SuperpixelCache(build_superpixels(name, **o), HERE / "superpixels") for name, o in GENERATORS.items()
    }
    model, _ = model_of("full")
    cache = FrozenCache(HERE / "features", model.frozen.settings())
    writer = FeatureWriter(model.frozen, cache, None)
    for number in range(2):
        file = pictures / f"{number}.png"
        for store in stores.values():
            store.get(picture_key(file), read_pixels(file))
        writer.write(file, picture_key(file))
    command = ["convert", "--out", str(HERE / "shards"), "--jsonl", str(pictures / "expressions.jsonl")]
    command += ["--superpixels", str(stores["felzenszwalb"].folder), "--features", str(cache.folder)]
    assert shards(command) == 0


def picture_key(file: Path) -> str:
    from lavis_svp.datasets import pictures

    return pictures.picture_key(file.read_bytes())


def regions_json(regions) -> dict:
    return {
        "labels_sha256": hashlib.sha256(regions.labels.tobytes()).hexdigest(), "size": list(regions.labels.shape),
        "areas": regions.areas.tolist(), "boxes": regions.boxes.tolist(), "levels": regions.levels.tolist(),
        "scores": regions.scores.tolist(),
    }  # fmt: skip


def tensors_json(found: dict) -> dict:
    from lavis_svp.common.checkpoints import content_digest

    return {
        name: {
            "dtype": str(t.dtype),
            "shape": list(t.shape),
            "sum": float(t.double().sum()),
            "digest": content_digest(t),
        }
        for name, t in found.items()
    }


def expect_stores() -> tuple[dict, dict]:
    from lavis_svp.datasets.shards.source import ShardSource
    from lavis_svp.datasets.shards.stored import ShardFeatures, ShardSuperpixels
    from lavis_svp.datasets.shards.validate import validate
    from lavis_svp.models.frozen_cache import open_features
    from lavis_svp.superpixels.cache import open_store

    facts: dict = {"superpixels": {}, "features": {}, "shards": {}, "pictures": {}}
    keys = [picture_key(HERE / "pictures" / f"{number}.png") for number in range(2)]
    facts["pictures"] = {f"{number}.png": key for number, key in enumerate(keys)}
    for folder in sorted((HERE / "superpixels").iterdir()):
        store = open_store(folder)
        facts["superpixels"][folder.name] = {
            "settings": store.header["settings"],
            "regions": {key: regions_json(store.get(key)) for key in store.keys()},  # noqa: SIM118
        }
    (folder,) = (HERE / "features").iterdir()
    cache = open_features(folder)
    facts["features"] = {
        "folder": folder.name,
        "settings": cache.settings,
        "pictures": {key: tensors_json(cache.get(key)) for key in keys},
    }
    source = ShardSource(HERE / "shards")
    superpixels, features = ShardSuperpixels(source), ShardFeatures(source)
    facts["shards"] = {
        "faults": list(validate(HERE / "shards").faults),
        "settings": source.index.settings,
        "splits": {
            split: [
                {
                    "image_id": picture.image_id, "file_name": picture.file_name, "size": list(picture.size),
                    "expressions": [[one.text, list(one.targets)] for one in picture.expressions],
                    "instances": [
                        {
                            "id": one.annotation_id,
                            "category": one.category,
                            "mask_sha256": hashlib.sha256(source.mask(picture, one).tobytes()).hexdigest(),
                            "area": int(source.mask(picture, one).sum()),
                        }
                        for one in source.instances(picture.image_id)
                    ],
                }
                for picture in source.pictures(split)
            ]
            for split in source.splits()
        },
        "superpixels": {key: regions_json(superpixels.get(key)) for key in keys},
        "features": {key: tensors_json(features.get(key)) for key in keys},
    }  # fmt: skip
    return facts, {}


# --------------------------------------------------------------------------- digests that must not change


def digests() -> dict:
    """Names of caches and data: of the shipped model, of each generator's defaults, of RefShapes."""
    from lavis_svp import launch
    from lavis_svp.models.frozen import FrozenInputsMaker
    from lavis_svp.models.frozen_cache import FrozenCache
    from lavis_svp.models.options import parse_model_options
    from lavis_svp.projectors import build_projector, list_projectors
    from lavis_svp.projectors.base import ENCODER_OUTPUTS
    from lavis_svp.superpixels import build_superpixels, list_superpixels
    from lavis_svp.superpixels.cache import SuperpixelCache

    scratch = WORK / "digests"
    project = launch.read_project(OLD / "projects/svp/eval/refshapes_seg_tiny.yaml")
    section = launch.build_config(project).model_cfg
    options = parse_model_options(section)
    frozen = FrozenInputsMaker(options.vision_encoder, options.sam, options.superpixels)
    found: dict = {"tiny": {}, "superpixels_by_default": {}, "refshapes": {}}
    found["tiny"]["features_settings"] = frozen.settings()
    found["tiny"]["features_folder"] = FrozenCache(scratch, frozen.settings()).folder.name
    found["tiny"]["superpixels_settings"] = frozen.generator.settings()
    found["tiny"]["superpixels_folder"] = SuperpixelCache(frozen.generator, scratch).folder.name
    found["tiny"]["features_folder_by_projector"] = {}
    for name in list_projectors():
        projector = build_projector(name, vision_dim=frozen.patch_dim, llm_dim=64, grid=frozen.vision_encoder.grid)
        wants = projector.requires & ENCODER_OUTPUTS
        if "levels" in wants:
            continue  # the encoder must say which
        frozen.ask(wants)
        found["tiny"]["features_folder_by_projector"][name] = FrozenCache(scratch, frozen.settings()).folder.name
    for name in list_superpixels():
        if name != "sam":
            generator = build_superpixels(name)
            found["superpixels_by_default"][name] = {
                "settings": generator.settings(), "folder": SuperpixelCache(generator, scratch).folder.name
            }  # fmt: skip
    found["refshapes"]["train 8, val 2, test 2, seed 0"] = data_json(WORK / "data")
    found["refshapes"]["crowded: train 2, val 1, test 2, seed 3"] = crowded_data()
    found["summaries"] = summaries()
    return found


def summaries() -> dict:
    """By project YAML: the digests of its sections that a result's summary holds."""
    from lavis_svp import launch
    from lavis_svp.common.options import plain
    from lavis_svp.tasks.facts import digest

    found = {}
    for path in sorted((OLD / "projects/svp").glob("*/*.yaml")):
        config = launch.build_config(launch.read_project(path))
        data = {name: digest(section) for name, section in plain(config.datasets_cfg).items()}
        found[f"{path.parent.name}/{path.name}"] = {"model": digest(plain(config.model_cfg)), "datasets": data}
    return found


def crowded_data() -> dict:
    """RefShapes with the scenes of the type ``crowded``."""
    from omegaconf import OmegaConf

    from lavis_svp.datasets.refshapes import build_refshapes
    from lavis_svp.datasets.refshapes.config import RefShapesConfig

    yaml = OmegaConf.load(OLD / "lavis_svp/configs/datasets/refshapes/crowded.yaml")
    scene = OmegaConf.to_container(yaml.datasets.refshapes_seg.build_info.scene)
    scene = {key: tuple(value) if isinstance(value, list) else value for key, value in scene.items()}
    build_refshapes(WORK / "crowded", {"train": 2, "val": 1, "test": 2}, 3, RefShapesConfig(**scene), progress=False)
    return data_json(WORK / "crowded")


def data_json(root: Path) -> dict:
    """What a folder with RefShapes holds: digests of the annotations' files, and of all pictures' bytes and pixels."""
    import numpy as np
    from PIL import Image

    folder = root / "refshapes"
    files, drawn = hashlib.sha256(), hashlib.sha256()
    pictures = sorted((root / "images/refshapes").glob("*.png"))
    for path in pictures:
        files.update(path.name.encode() + path.read_bytes())
        drawn.update(path.name.encode() + np.asarray(Image.open(path)).tobytes())
    return {
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "instances_sha256": hashlib.sha256((folder / "instances.json").read_bytes()).hexdigest(),
        "refs_sha256": hashlib.sha256((folder / "refs(svp).p").read_bytes()).hexdigest(),
        "pictures": len(pictures),
        "picture_files_sha256": files.hexdigest(),
        "picture_pixels_sha256": drawn.hexdigest(),
    }


def default_data() -> dict | None:
    """The same of the tiny YAMLs' data, where a run of theirs has left it in ``$TINY_CACHE/lavis_svp`` (else None)."""
    root = Path(os.environ.get("TINY_CACHE", "/nowhere")) / "lavis_svp/data"
    return data_json(root) if (root / "refshapes/manifest.json").is_file() else None


# --------------------------------------------------------------------------- all of it


def copy_yamls() -> None:
    for folder in ("train", "eval", "ablation", "comparison", "deepspeed"):
        shutil.copytree(OLD / "projects/svp" / folder, HERE / "yaml/projects/svp" / folder)
    shutil.copytree(OLD / "lavis_svp/configs", HERE / "yaml/lavis_svp/configs")
    (HERE / "shipped_metadata.json").write_text(json.dumps(shipped_metadata(), indent=1, sort_keys=True) + "\n")


def shipped_metadata() -> dict:
    from safetensors import safe_open

    with safe_open(OLD / "lavis_svp/weights/svp_ris_tiny.safetensors", "pt") as file:
        metadata = {key: _read(value) for key, value in file.metadata().items()}
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        dtypes = sorted({file.get_slice(key).get_dtype() for key in file.keys()})  # noqa: SIM118
    return {"metadata": metadata, "tensors": shapes, "dtypes": dtypes}


def _read(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return value


def expect() -> tuple[dict, dict]:
    facts, tensors = {"commit": COMMIT, "runs": {}}, {}
    parts = {"projectors": expect_projectors, "host_llava": expect_host, "stores": expect_stores}
    for name in RUNS:
        facts["runs"][name], more = expect_run(name)
        tensors |= more
    for name, function in parts.items():
        facts[name], more = function()
        tensors |= more
    return facts, tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is there, in this process")
    check = parser.parse_args().check
    import lavis_svp

    assert Path(lavis_svp.__file__).is_relative_to(OLD), f"{lavis_svp.__file__} is not the old code in {OLD}"
    head = subprocess.run(["git", "-C", OLD, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(COMMIT), f"{OLD} is at {head}, not at {COMMIT}"
    import torch
    from safetensors.torch import load_file, save_file

    from lavis_svp.common.paths import cache_root

    torch.set_num_threads(1)
    real = cache_root()
    if not check:
        shutil.rmtree(WORK, ignore_errors=True)
        for old in ("yaml", "runs", "projectors", "host_llava", "superpixels", "features", "shards", "pictures"):
            shutil.rmtree(HERE / old, ignore_errors=True)
        (WORK / "cache/lavis_svp").mkdir(parents=True)
        (WORK / "cache/lavis_svp/weights").symlink_to(real / "weights")
    os.environ["XDG_CACHE_HOME"] = str(WORK / "cache")
    os.chdir(WORK)
    if not check:
        make_parts(WORK / "parts")
        copy_yamls()
        train_all()
        make_projectors()
        make_host()
        make_stores()
    facts, tensors = expect()
    if not check:
        (HERE / "expected.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        save_file(tensors, HERE / "expected.safetensors")
        found = digests()
        default = default_data()
        if default is not None:
            found["refshapes"]["train 1200, val 40, test 150, seed 0"] = default
        (HERE / "digests.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    before = json.loads((HERE / "expected.json").read_text())
    stored = load_file(HERE / "expected.safetensors")
    assert json.loads(json.dumps(facts)) == before, "expected.json differs"
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[key], tensors[key]) for key in stored)
    kept = json.loads((HERE / "digests.json").read_text())
    again = json.loads(json.dumps(digests()))
    assert again["tiny"] == kept["tiny"] and again["superpixels_by_default"] == kept["superpixels_by_default"]
    for name, run in before["runs"].items():
        resume(name, run)
    print("All expected values are the same again, bit for bit.")


def resume(name: str, expected: dict) -> None:
    """Go on from the stored checkpoint: the training ends where the undisturbed one did."""
    from lavis_svp.common.checkpoints import content_digest, read_checkpoint

    folder = WORK / "resumed" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(HERE / "runs" / name / RUNS[name], folder)
    yaml = str(HERE / "runs" / name / "project.yaml")
    command = [sys.executable, "-m", "lavis_svp.train", "--cfg-path", yaml, "--options", f"run.output_dir={folder}"]
    subprocess.run(command, cwd=WORK, check=True)
    end = read_checkpoint(folder / f"checkpoint_{expected['last_step']}.pth")
    assert content_digest(dict(sorted(end["model"].items()))) == expected["last_weights_digest"], name


if __name__ == "__main__":
    main()
