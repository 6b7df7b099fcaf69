"""Export a trained SVP as a plain Hugging Face folder, with LoRA merged, and prove that it is the same model.

The folder holds the language model's ``config.json``, ``*.safetensors`` and tokenizer, with ``[SEG]`` as an ordinary
token; ``svp.safetensors``: projector, prompt head, mask decoder and ``[SEG]`` rows; and ``svp.yaml``: the model section
that joins both again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lavis_svp.models  # noqa: F401  (LAVIS and the registrations)
from lavis_svp.common.checkpoints import read_checkpoint
from lavis_svp.common.devices import checked_device
from lavis_svp.common.tensor_files import load_tensors, save_tensors
from lavis_svp.export.parity import compare, observe
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.models.checkpoint import find_weights
from lavis_svp.models.config import ModelOptions, parse_model_options
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.runners.options import stored_project
from lavis_svp.runners.project import (
    apply_option,
    build_config,
    dot_list,
    read_project,
    section_with_dtypes,
    weights_from_checkpoint,
)

SVP_WEIGHTS = "svp.safetensors"
SVP_YAML = "svp.yaml"
SHARD_SIZE = "5GB"  # Hugging Face's default
Precision = Literal["float32", "float16", "bfloat16"]
TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Precision of the files -> largest difference of the merged model, as a share of the largest value."""
SVP_MODULES = ("projector.", "readout.", "aids.", "mask_head.mask_decoder.", "language.added_")
LANGUAGE_FILES = ("language.transformer.", "language.embed_tokens.", "language.output.")
HEADER = """\
# Model section of an exported SVP: use it in place of a project YAML's. If the folder moves, change the two paths in
# it, language.name and finetuned. The language model has its LoRA adapters merged; it is frozen and has none.
"""


def merge(
    checkpoint: Path,
    out: Path,
    cfg_path: str | None = None,
    options: Sequence[str] = (),
    *,
    dtype: Precision = "float32",
    shard_size: str = SHARD_SIZE,
    device: str = "auto",
) -> None:
    """Export a trained model.

    The folder appears under its name only after the model read back from it has been compared with the trained one, on
    ``device`` and in the number type that ``model.language.dtype`` means there: bfloat16 on most CUDA cards, unless
    ``options`` set it. Adapters that were trained on quantised weights (QLoRA) are merged into the named weights
    without quantisation, and compared on them.

    Args:
        checkpoint: a checkpoint of ``svp_ris``, or a folder of which the newest is taken.
        out: the folder to write.
        cfg_path: the project YAML; None = the checkpoint's own configuration.
        options: values that replace those of the configuration, as ``--options``.
        dtype: precision of the language model's files; SVP's own parts are float32.
        shard_size: size limit of each file of the language model's weights.
        device: where both models run, a name for ``common.devices.checked_device``.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: ``out`` exists, there is no such device, the checkpoint belongs to another model, or the exported
            model differs from the trained one.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out, or delete it.")
    path = find_weights(checkpoint)
    place = checked_device(device, "--device")
    section = whole_language(model_section(path, cfg_path, options))
    model = SvpRis.from_config(section_with_dtypes(section, place)).to(place).eval()
    embedding_std = model.language.embedding_std  # of the named weights, before the trained ones are loaded
    model.load_checkpoint(str(path))
    print(f"Checkpoint: {path}", flush=True)
    before = observe(model)
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        merged = merge_adapters(model.language.transformer)
        write_language_folder(model.language, work, getattr(torch, dtype), shard_size)
        save_tensors(work / SVP_WEIGHTS, {name: tensor.detach().clone() for name, tensor in svp_state(model).items()})
        exported = exported_section(section, model, out.resolve(), embedding_std)
        computed = str(next(model.language.transformer.parameters()).dtype).removeprefix("torch.")
        tolerance = max(TOLERANCES[dtype], TOLERANCES.get(computed, 0.0))  # type: ignore[call-overload]
        text = HEADER + OmegaConf.to_yaml(OmegaConf.create({"model": exported}))
        (work / SVP_YAML).write_text(text, encoding="utf-8")
        del model
        unmoved = {**exported, "language": {**exported["language"], "name": str(work)}, "load_finetuned": False}
        again = SvpRis.from_config(section_with_dtypes(OmegaConf.create(unmoved), place)).to(place).eval()
        rows = seg_row_difference(
            again, load_tensors(work / SVP_WEIGHTS)
        )  # the folder's own, as other programs read it
        again.load_checkpoint(str(work / SVP_WEIGHTS))
        difference = compare(before, observe(again))
        del again
        print(f"Merged {merged} adapters. Exported against trained: {difference}; [SEG] rows {rows:.2e}.", flush=True)
        if not all(value <= tolerance for value in (difference.tokens, difference.masks, rows)):  # also for nan
            raise ValueError(
                f"The exported model is not the trained one: the difference is above {tolerance:g} ({dtype} in files, "
                f"{computed} in products). Nothing was written to {out}."
            )
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: equal within {tolerance:g} ({dtype}). Use it with the model section in {out / SVP_YAML}.")


def svp_state(model: SvpRis) -> dict[str, Tensor]:
    """Collect all tensors of a model that neither the language model's folder nor the named weights hold."""
    state = dict(model.checkpoint_state())
    state.update((name, p.detach()) for name, p in model.named_parameters() if name.startswith(SVP_MODULES))
    return {name: tensor for name, tensor in state.items() if not name.startswith(LANGUAGE_FILES)}


def seg_row_difference(model: SvpRis, state: Mapping[str, Tensor]) -> float:
    """Largest difference between the ``[SEG]`` rows of a model and of a state, as a share of the largest value."""
    names = [name for name in state if name.startswith("language.added_")]
    own = dict(model.named_parameters())
    pairs = [(own[name].detach().cpu(), state[name]) for name in names]
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def exported_section(section: Any, model: SvpRis, folder: Path, embedding_std: float) -> dict[str, Any]:
    """Make the model section that loads an export: the trained model's, with the language model of the folder.

    Args:
        section: the trained model's, for LAVIS's own keys.
        model: the trained model, which knows all options with their defaults.
        folder: final place of the export.
        embedding_std: scale of the visual tokens of the trained model; the folder's embeddings may have another.
    """
    known = configured_options(section, model.options)
    options = json.loads(json.dumps(dataclasses.asdict(known)))  # tuples become lists
    language = {"name": str(folder), "num_layers": None, "tuning": "frozen", "train_embeddings": "added"}
    options["language"] |= {**language, "embedding_std": embedding_std}
    lavis = {
        "arch": section.get("arch", "svp_ris"),
        "model_type": section.get("model_type", "tiny"),
        "load_pretrained": False,
        "pretrained": "",
        "load_finetuned": True,
        "finetuned": str(folder / SVP_WEIGHTS),
    }
    return {**lavis, **options, "trainable": None, "learning_rates": {}}


def configured_options(section: Any, options: ModelOptions) -> ModelOptions:
    """A model's options with the dtypes of its section: the model's own are what ``auto`` means on its device."""
    configured = parse_model_options(section)
    parts = {name: part for name, part in vars(options).items() if hasattr(part, "dtype")}
    dtypes = {name: getattr(configured, name).dtype for name in parts}
    return dataclasses.replace(
        options, **{name: dataclasses.replace(part, dtype=dtypes[name]) for name, part in parts.items()}
    )


def model_section(path: Path, cfg_path: str | None, options: Sequence[str]) -> Any:
    """Find the model section that a checkpoint belongs to, set to load no other trained weights.

    Args:
        path: the checkpoint.
        cfg_path: the project YAML; None = the configuration stored in the checkpoint.
        options: values that replace those of the configuration, as ``--options``.

    Raises:
        ValueError: there is no project YAML, and the checkpoint stores no configuration.
    """
    if cfg_path:
        project = read_project(cfg_path, options)
        weights_from_checkpoint(project)
        return build_config(project).model_cfg
    stored = read_checkpoint(path).get("config")
    if stored is None:
        raise ValueError(f"{path} holds no configuration; set --cfg-path to the project YAML.")
    project = stored_project(stored, path)
    for option in dot_list(options):
        project = apply_option(project, option)
    weights_from_checkpoint(project)
    return project.model


def whole_language(section: Any) -> Any:
    """Copy a model section, with the language model whole on one device: not quantised, and without a device map.

    An adapter cannot be merged into quantised matrices without rounding it to their few values.
    """
    quantisation = (section.get("language") or {}).get("quantization", "none")
    if quantisation != "none":
        print(f"Trained on {quantisation} weights; merged into the named weights without quantisation.", flush=True)
    return OmegaConf.merge(section, {"language": {"quantization": "none", "device_map": None}})


def merge_adapters(transformer: nn.Module) -> int:
    """Merge every LoRA adapter of a transformer into its layer, in place, and put the plain layers back.

    Returns:
        the number of adapters.

    Raises:
        ValueError: an adapter holds numbers that are not finite (peft's check).
    """
    adapted = [(name, module) for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        transformer.set_submodule(name, module.get_base_layer())
    return len(adapted)


def with_row(table: Tensor, index: int, row: Tensor) -> Tensor:
    """Copy a table (V, D) with one row (1, D) set, or appended if the index is V; a ValueError if it is larger.

    The index is below V where the table is padded beyond the tokenizer.
    """
    if index > len(table):
        raise ValueError(f"[SEG] has id {index}, but the embedding table has only {len(table)} rows.")
    if index == len(table):
        return torch.cat([table, row])  # (V + 1, D)
    table = table.clone()
    table[index] = row[0]
    return table


@torch.no_grad()
def write_language_folder(language: LanguageModel, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Write configuration, weights (safetensors, in shards) and tokenizer.

    ``AutoModelForCausalLM.from_pretrained(folder)`` gives a model that reads and writes ``[SEG]`` as an ordinary token.

    Args:
        language: without adapters (:func:`merge_adapters`).
        folder: an existing folder.
        dtype: of the weights in the files.
        shard_size: size limit of a file, in Hugging Face's form ("5GB").
    """
    config = copy.deepcopy(language.config)
    table = with_row(language.embed_tokens.weight, language.seg_id, language.added_embedding)
    config.vocab_size = len(table)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    inner = {**language.transformer.state_dict(), "embed_tokens.weight": table}
    model.model.load_state_dict({name: tensor.to(dtype) for name, tensor in inner.items()}, assign=True)
    head = model.get_output_embeddings()
    if language.output is None or language.added_output is None:
        head.weight = model.get_input_embeddings().weight
    else:
        rows = with_row(language.output.weight, language.seg_id, language.added_output)
        head.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
        if language.output.bias is not None:
            raise ValueError("The output layer has a bias without an entry for [SEG], which this export cannot handle.")
    model.save_pretrained(folder, max_shard_size=shard_size, safe_serialization=True)
    language.tokenizer.save_pretrained(folder)
