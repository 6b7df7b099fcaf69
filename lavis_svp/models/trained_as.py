"""Weights that say which model they are: is the configured one that?"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lavis_svp.common.checkpoint_errors import WrongCheckpointError
from lavis_svp.common.metadata import read_metadata
from lavis_svp.common.options import build_options
from lavis_svp.models.options import ModelOptions, parse_model_options
from lavis_svp.projectors.registry import PROJECTORS

MODEL = "model"  # the metadata's entry: the model section as JSON, every option filled in
ONLY_TRAINING = (
    "losses.*",
    "layout",
    "cache_frozen",
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
    "aids.*",
)
"""Options that change nothing in what given weights say. Where they change which weights there are (an adapter), the
comparison of names and shapes finds it."""
SET_AFTER_TRAINING = ("presence", "presence.*")
COUNTS_ALL_THE_SAME = ("aids.token_norm",)
OTHER_INPUT = ("superpixels.*", "prompt.*", "sam.side", "vision_encoder.side", "vision_encoder.fit")
"""Options under which the weights run, on another input than they were trained on."""


def model_json(options: ModelOptions) -> str:
    """A model's options, defaults included, as the metadata of its weights holds them."""
    return json.dumps(dataclasses.asdict(options), sort_keys=True)


def check_config_compatible(options: ModelOptions, path: Path) -> None:
    """Compare the options of a model with those that its weights were trained with, where the file tells them.

    Args:
        options: of the model that is to get the weights.
        path: the weights; only a ``.safetensors`` file can have metadata.

    Raises:
        WrongCheckpointError: the weights are those of another architecture, or of options that this version does not
            know; the message lists the keys.
        CorruptCheckpointError: the file cannot be read.
    """
    stored = read_metadata(path).get(MODEL) if path.suffix == ".safetensors" else None
    if stored is None:
        return
    try:
        trained = parse_model_options(json.loads(stored))
        before, now = flat_options(trained), flat_options(options)
    except (ValueError, KeyError) as error:
        raise WrongCheckpointError(f"{path} was trained by another version of lavis_svp: {error}") from error
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and not only_training(key)]
    said = {key: f"model.{key}: {before.get(key)!r} in training, {now.get(key)!r} now" for key in differing}
    other = [said[key] for key in differing if _matches(key, OTHER_INPUT)]
    wrong = [said[key] for key in differing if not _matches(key, OTHER_INPUT)]
    if wrong:
        raise WrongCheckpointError(
            f"{path} holds weights of another model. {'; '.join(wrong)}. Configure the model as it was trained, or "
            "start without these weights: model.load_finetuned: False."
        )
    if other:
        logging.warning("%s gets another input than in training. %s.", path, "; ".join(other))


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
    return _matches(key, (*ONLY_TRAINING, *SET_AFTER_TRAINING)) and key not in COUNTS_ALL_THE_SAME


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    items = [_flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in node.items()]
    return {key: value for item in items for key, value in item.items()}
