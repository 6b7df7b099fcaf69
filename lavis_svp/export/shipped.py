"""Make the small weights file that comes with the package from a training checkpoint.

It is one ``.safetensors`` file with the tensors that the zoo's weights do not hold: no frozen weights, no optimizer.
Matrices are bf16. Vectors, scalars and running statistics keep their precision: they are under a hundredth of the
bytes, a bf16 running variance would shift every state that it normalises, and counters must not be rounded. A ``.json``
record next to the file has its sha256. The metadata records origin, training, the words of the training and the model
section; ``models/checkpoint.py: check_config_compatible`` compares the last with the configured model.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

import lavis_svp.zoo
from lavis_svp.common.checkpoints import read_checkpoint
from lavis_svp.common.devices import checked_device
from lavis_svp.common.files import file_errors, read_json
from lavis_svp.common.tensor_files import save_tensors
from lavis_svp.export.merge import configured_options, model_section
from lavis_svp.export.parity import compare, observe
from lavis_svp.export.training_words import read_vocabulary, training_vocabulary
from lavis_svp.metrics.records import write_json
from lavis_svp.models.checkpoint import MODEL_KEY, find_weights, model_json
from lavis_svp.models.config import ModelOptions, parse_model_options
from lavis_svp.models.param_groups import part_of
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.models.vocabulary import VOCABULARY_KEY, Vocabulary
from lavis_svp.runners.options import stored_project, upgraded_config
from lavis_svp.runners.project import section_with_dtypes, weights_from_checkpoint
from lavis_svp.segmentation.no_target import CALIBRATION_KEY, read_fit
from lavis_svp.vision.extra_channels import OF_CLASSIFIER
from lavis_svp.zoo.shipped import shipped_of_type
from lavis_svp.zoo.store import sha256_of

MAX_BYTES = 60_000_000  # larger files do not belong in a repository
JSON_ENTRIES = ("origin", MODEL_KEY, CALIBRATION_KEY)  # entries of the metadata that are JSON
SUMMARY = "result/*.summary.json"  # a run's own record of its command


def ship(
    checkpoint: Path,
    out: Path | None = None,
    command: str | None = None,
    no_target: Path | None = None,
    device: str = "auto",
    vocabulary: Path | None = None,
) -> Path:
    """Write the file and its record, after a model that loads the file has been compared with the trained one.

    Args:
        checkpoint: a checkpoint of ``svp_ris`` with its configuration, or a folder of which the newest is taken.
        out: the ``.safetensors`` file; an older one is replaced. None = the package's own of the model's type.
        command: the command of the training; None = the one in the summary next to the checkpoint.
        no_target: result of ``lavis-svp probe no-target`` for these weights; None = not calibrated.
        device: where both models are compared, a name for ``common.devices.checked_device``.
        vocabulary: a text file with the words of the training; None = those of the run's annotations.

    Returns:
        the file.

    Raises:
        FileNotFoundError: there is no checkpoint, or the run's annotations are not there.
        UnknownNameError: no ``out`` is given, and the package has no weights of the model's type.
        ValueError: the weights take more than ``MAX_BYTES``, use parts that are not the zoo's, lack a known command, or
            are not read back as they were written; or the words of the training are not known.
    """
    path = find_weights(checkpoint)
    place = checked_device(device, "--device")
    section = model_section(path, None, ())
    target = out or shipped_of_type(section.get("model_type")).file
    if target.suffix != ".safetensors":
        raise ValueError(f"The file to write is a .safetensors, got {target}.")
    contents = read_checkpoint(path)
    words = _words_of(contents["config"], path) if vocabulary is None else read_vocabulary(vocabulary)
    model = SvpRis.from_config(section_with_dtypes(section, place)).to(place).eval()
    model.load_checkpoint(str(path))
    options = configured_options(section, model.options)
    metadata = describe(options, contents, command or _command_of(path.parent))
    metadata[VOCABULARY_KEY] = words.text
    if no_target is not None:
        metadata[CALIBRATION_KEY] = read_fit(no_target)
    state = compact(model.checkpoint_state())
    before = observe(model)
    del model
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}.tmp.safetensors")
    try:
        save_tensors(unfinished, state, metadata)
        weights = {"load_finetuned": True, "finetuned": str(unfinished)}
        again = SvpRis.from_config(section_with_dtypes(OmegaConf.merge(section, weights), place)).to(place).eval()
        loaded = again.checkpoint_state()
        wrong = [name for name in state if not torch.equal(loaded[name].cpu().to(state[name].dtype), state[name])]
        if wrong or loaded.keys() != state.keys():
            raise ValueError(f"The file is not read back as it was written: {', '.join(wrong) or 'names differ'}.")
        difference = compare(before, observe(again))
        unfinished.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    readable = {key: json.loads(value) if key in JSON_ENTRIES else value for key, value in metadata.items()}
    readable[VOCABULARY_KEY] = len(words.words)  # the record stays short; the file has the words
    size = target.stat().st_size
    record = {"file": target.name, "size": size, "sha256": sha256_of(target), **readable}
    write_json(target.with_suffix(".json"), record)
    print(f"Checkpoint: {path}, {metadata['steps']} steps, seed {metadata['seed']}.")
    print(f"Vocabulary: {len(words.words):,} words.")
    print(f"In bf16 against the checkpoint: {difference}.")
    print(f"{target}: {len(state)} tensors, {size / 1e6:.1f} MB ({_by_part(state)}).")
    return target


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert matrices of a model's state to bf16; all tensors lie on the CPU, contiguous and without shared memory.

    Raises:
        ValueError: the state holds a tensor of the frozen half, which the named weights hold, or takes more than
            ``MAX_BYTES``; the message then has the size of each part.
    """
    frozen = [name for name in state if part_of(name) == "frozen"]
    if frozen:
        raise ValueError(f"Frozen weights are not shipped, but the checkpoint changes {', '.join(frozen[:3])}.")
    small = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.ndim >= 2 else tensor
        for name, tensor in state.items()
    }
    total = sum(tensor.nbytes for tensor in small.values())
    if total > MAX_BYTES:
        raise ValueError(
            f"The weights take {total / 1e6:.1f} MB, the limit is {MAX_BYTES / 1e6:.0f} MB: {_by_part(small)}. Train "
            "less of the language model (model.language.num_layers, or tuning: lora)."
        )
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in small.items()}


def describe(options: ModelOptions, contents: Mapping[str, Any], command: str) -> dict[str, str]:
    """Make the metadata: origin with licences, the model section, steps, seed, command and date.

    Args:
        options: of the trained model.
        contents: of its checkpoint.
        command: of the training.

    Raises:
        ValueError: the model is made of weights that are not the zoo's, so the file would be useless elsewhere.
    """
    known = {entry.name: entry for entry in lavis_svp.zoo.list_weights()}
    roles = {
        options.language.name: "language model, trained further",
        options.sam.name: "mask decoder, trained further; its encoder, needed beside this file, is not in it",
        options.vision_encoder.name: "frozen vision encoder, needed beside this file, not in it",
    }
    if options.reads_classes or OF_CLASSIFIER & set(options.vision_encoder.extra_channels):
        roles[options.classifier.name] = "frozen image classifier, needed beside this file, not in it"
    strangers = [name for name in roles if name not in known]
    if strangers:
        raise ValueError(f"Shipped weights are made from the zoo's, but this model uses {', '.join(strangers)}.")
    origin = [
        {"name": name, "role": role, **{key: getattr(known[name], key) for key in ("source", "licence", "notice")}}
        for name, role in roles.items()
    ]
    run = contents.get("config", {}).get("run", {})
    return {
        "format": "pt",  # what transformers expects of a safetensors file
        "origin": json.dumps(origin),
        MODEL_KEY: model_json(options),
        "steps": str(contents.get("iters", "unknown")),
        "seed": str(run.get("seed", "unknown")),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _words_of(config: Any, path: Path) -> Vocabulary:
    """The words of the training that a checkpoint is of."""
    project = stored_project(config, path)
    weights_from_checkpoint(project)
    project.run.output_dir = str(path.parent)  # nothing is written there
    return training_vocabulary(project, parse_model_options(project.model).prompt, upgraded_config(config))


def _command_of(folder: Path) -> str:
    """The command in the newest summary of a run."""
    summaries = sorted(folder.glob(SUMMARY), key=lambda path: path.stat().st_mtime)
    if not summaries:
        raise ValueError(f"No summary in {folder / 'result'} holds the command of the training; set --command.")
    with file_errors(summaries[-1], "Set --command."):
        command: str = read_json(summaries[-1])["run"]["command"]
    return command


def _by_part(state: Mapping[str, Tensor]) -> str:
    sizes: Counter[str] = Counter()
    for name, tensor in state.items():
        sizes[part_of(name)] += tensor.nbytes
    return ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in sizes.most_common())
