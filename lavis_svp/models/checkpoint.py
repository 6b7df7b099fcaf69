"""Trained weights: where they are, whether they fit the configured model, and what of them a new stage starts from."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_svp.common.checkpoints import (
    WrongCheckpointError,
    newest_checkpoint,
    read_checkpoint,
    read_metadata,
    shorten,
    tensors_differ,
)
from lavis_svp.common.files import BadFileError, parse_json
from lavis_svp.common.options import build_options
from lavis_svp.common.tensor_files import load_tensors
from lavis_svp.models.config import ModelOptions, parse_model_options
from lavis_svp.models.param_groups import checkpoint_state, is_adapter, part_of, starts_random
from lavis_svp.projectors.base import PROJECTORS
from lavis_svp.zoo.shipped import is_shipped, shipped_file

MODEL_KEY = "model"  # the metadata's entry: the model section as JSON, every option filled in
ONLY_TRAINING = (
    "losses.*",
    "layout",
    "cache_features",
    "trainable",
    "learning_rates.*",
    "learning_rates",
    "sam.max_masks_per_image",
    "sam.train_decoder",
    "language.tuning",
    "language.train_embeddings",
    "language.lora.*",
    "language.gradient_checkpointing",
    "language.max_*",
    "auxiliary_losses.*",
    "visual_tokens.shuffle",
    "language.dtype",
    "language.attn_implementation",
    "language.quantization",
    "language.device_map",
    "vision_encoder.dtype",
    "vision_encoder.attn_implementation",
    "sam.dtype",
    "classifier.dtype",
    "superpixels.cache",
)
"""Options that do not change what trained weights compute, but for rounding. Where they change which weights there are
(an adapter), the comparison of names and shapes notices."""
SET_AFTER_TRAINING = ("no_target", "no_target.*")
INPUT_KEYS = ("superpixels.*", "prompt.*", "sam.side", "vision_encoder.side", "vision_encoder.fit", "classifier.side")
"""Options that give the weights a different input from the one they were trained on: a warning, no error."""


def find_weights(where: str | Path) -> Path:
    """The file of trained weights at a place.

    Args:
        where: a checkpoint (``.pth``), a bare state (``.safetensors``), a folder, whose newest checkpoint it is, or the
            name of weights that come with the package.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if is_shipped(where):
        return shipped_file(str(where))
    path = Path(where).expanduser()
    found = newest_checkpoint(path) if path.is_dir() else path
    if found is None or not found.exists():
        kind = "checkpoint_<steps>.pth in the folder" if path.is_dir() else "file of trained weights at"
        raise FileNotFoundError(f"There is no {kind} {path} (current directory: {Path.cwd()}).")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ``model`` entry, or of a safetensors file; only these are read.

    Raises:
        FileNotFoundError: there is no such file.
        BadFileError: it is damaged, or holds something else than tensors by their names.
    """
    return load_tensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)["model"]


def load_pretrained_parts(model: nn.Module, where: str | Path) -> set[str]:
    """Load an earlier stage's weights: everything that the file holds, trained now or not.

    Args:
        model: the model of the new stage, adapters included.
        where: see :func:`find_weights`.

    Returns:
        The names of the parameters that were loaded and that the model did not have with these values already.

    Raises:
        FileNotFoundError: nothing is there.
        WrongCheckpointError: a tensor of the file has no place in the model, or another shape; all are listed.
    """
    path = find_weights(where)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = to_lora_names(read_weights(path), own)
    problems = {
        "unknown to the model": [name for name in state if name not in own],
        "of another shape": [
            f"{name}: {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model"
            for name, tensor in state.items()
            if name in own and own[name].shape != tensor.shape
        ],
    }
    found = [f"{what}: {shorten(which)}" for what, which in problems.items() if which]
    if found:
        raise WrongCheckpointError(
            f"model.pretrained: {path} holds weights of another model ({len(state)} tensors). {'; '.join(found)}. "
            "The model section must describe the same architecture as the earlier stage's, except for parts it adds."
        )
    changed = {name for name, _ in model.named_parameters() if name in state and tensors_differ(own[name], state[name])}
    rounded = [name for name in changed if own[name].element_size() < state[name].element_size()]
    if rounded:
        logging.warning(
            "%d tensors that the earlier stage trained and this one freezes are rounded to the dtype of their part and "
            "saved so: %s. Keep them exactly by model.language.dtype: float32.",
            len(rounded),
            shorten(sorted(rounded)),
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    logging.info("Loaded pretrained weights from %s: %d tensors (%s)", path, len(state), _by_part(state))
    lacking = {name: own[name] for name in checkpoint_state(model) if name not in state}
    fresh = {name: tensor for name, tensor in lacking.items() if starts_random(name)}
    for how, tensors in (("randomly initialised", fresh), ("from the named weights", lacking.keys() - fresh.keys())):
        if tensors:
            logging.info("%s: %s", how, _by_part({name: own[name] for name in lacking if name in tensors}))
    return changed


def to_lora_names(state: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights of layers that now have an adapter the name that peft gives them: ``q_proj.base_layer.weight``."""
    moved = {name.replace(".base_layer.", "."): name for name in known if ".base_layer." in name}
    return {name if name in known else moved.get(name, name): tensor for name, tensor in state.items()}


def _by_part(tensors: Mapping[str, Tensor]) -> str:
    """``projector 12 tensors, 345 numbers; ...``."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name, tensor in tensors.items():
        part = "LoRA" if is_adapter(name) else ".".join(name.split(".")[:2]) if _splits(name) else part_of(name)
        count[part] += 1
        size[part] += tensor.numel()
    return "; ".join(f"{part} {count[part]} tensors, {size[part]:,} numbers" for part in count)


def _splits(name: str) -> bool:
    """Whether a part is logged module by module, since stages add some of them (SSPE)."""
    return part_of(name) == "projector"


# ---------------------------------------------------------------- which model are they?


def model_json(options: ModelOptions) -> str:
    """A model's options, defaults included, as the metadata of its weights holds them."""
    return json.dumps(dataclasses.asdict(options), sort_keys=True)


def check_config_compatible(options: ModelOptions, path: Path) -> None:
    """Check that trained weights match the model configuration, where the file holds the one it was trained with.

    Args:
        options: the configured model.
        path: the weights; only a ``.safetensors`` file can have metadata.

    Raises:
        WrongCheckpointError: the weights are those of another architecture, or of options that this version does not
            know; the message lists the keys.
        BadFileError: the file cannot be read.
    """
    stored = read_metadata(path).get(MODEL_KEY) if path.suffix == ".safetensors" else None
    if stored is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # released weights keep the option names of their time
            trained = parse_model_options(parse_json(stored, f"'{MODEL_KEY}' in the metadata of {path}"))
        before, now = flat_options(trained), flat_options(options)
    except BadFileError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WrongCheckpointError(f"{path} was trained by another version of lavis_svp: {error}") from error
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and not only_training(key)]
    differences = {key: f"model.{key}: {before.get(key)!r} in training, {now.get(key)!r} now" for key in differing}
    other = [differences[key] for key in differing if _matches(key, INPUT_KEYS)]
    wrong = [differences[key] for key in differing if not _matches(key, INPUT_KEYS)]
    if wrong:
        raise WrongCheckpointError(
            f"{path} holds weights of another model. {'; '.join(wrong)}. Configure the model as it was trained, or "
            "start without these weights: model.load_finetuned: False."
        )
    if other:
        logging.warning("%s was trained on a different input. %s.", path, "; ".join(other))


def flat_options(options: ModelOptions) -> dict[str, Any]:
    """``{"projector.name": "svp", ...}`` with the defaults of the chosen projector filled in; sequences as lists."""
    section = dataclasses.asdict(options)
    projector = dict(section["projector"])
    name = projector.pop("name")
    filled = build_options(PROJECTORS.get(name).options_class, projector, f"model.projector ('{name}')")
    section["projector"] = {"name": name, **dataclasses.asdict(filled)}
    return _flat(json.loads(json.dumps(section)))


def only_training(key: str) -> bool:
    """Whether an option, by its flat key, is free to differ from the one that given weights were trained with."""
    return _matches(key, (*ONLY_TRAINING, *SET_AFTER_TRAINING))


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    items = [_flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in node.items()]
    return {key: value for item in items for key, value in item.items()}
