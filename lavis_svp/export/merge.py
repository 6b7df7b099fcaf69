"""``merge``: LoRA into the language model, a Hugging Face folder, the rest of SVP beside it, and proof of equality.

The folder then holds ``config.json``, ``*.safetensors`` and the tokenizer of the language model; ``svp.safetensors``:
projector, read-out, mask decoder and ``[SEG]`` rows; ``svp.yaml``: the model section that puts both together again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_svp import launch

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_svp.models.svp_ris import SvpRis

SVP_WEIGHTS = "svp.safetensors"
SVP_YAML = "svp.yaml"
SHARD_SIZE = "5GB"  # Hugging Face's usual one
# Largest share of the largest value by which the merged model may differ, by the precision of the files.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
SVP_MODULES = ("projector.", "readout.", "aids.", "mask_head.mask_decoder.", "language.added_")
LANGUAGE_FILES = ("language.transformer.", "language.embed_tokens.", "language.output.")
HEADER = """\
# Model section of an exported SVP: use it in place of a project YAML's. If the folder moves, change the two paths in
# it, language.name and finetuned. The language model has its LoRA adapters merged; it is frozen and has none.
"""


def add_command(commands: Any) -> None:
    """Add ``merge`` to the sub-commands of ``python -m lavis_svp.export``."""
    parser = commands.add_parser("merge", help="merge LoRA, write a Hugging Face folder and svp.safetensors")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint, or a folder: its newest")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write; must not exist")
    parser.add_argument("--cfg-path", help="the project YAML; default: the configuration stored in the checkpoint")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    parser.add_argument(
        "--dtype", choices=sorted(TOLERANCES), default="float32", help="of the language model's files (default float32)"
    )
    parser.add_argument("--shard-size", default=SHARD_SIZE, help=f"largest file of its weights (default {SHARD_SIZE})")
    parser.set_defaults(
        run=lambda args: merge(
            args.checkpoint, args.out, args.cfg_path, args.options, dtype=args.dtype, shard_size=args.shard_size
        )
    )


def merge(
    checkpoint: Path,
    out: Path,
    cfg_path: str | None = None,
    options: Sequence[str] = (),
    *,
    dtype: str = "float32",
    shard_size: str = SHARD_SIZE,
) -> None:
    """Export a trained model.

    The folder appears under its name only when the model read back from it has been compared with the trained one.

    Args:
        checkpoint: a checkpoint of ``svp_ris``, or a folder of which the newest is taken.
        out: the folder to write.
        cfg_path: the project YAML; None = the checkpoint's own configuration.
        options: overrides, as ``--options``.
        dtype: precision of the language model's files; SVP's own parts are float32.
        shard_size: the language model's weights go into files of at most this size.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: ``out`` exists, the checkpoint is of another model, or the exported model is not equal to the
            trained one.
    """
    import torch
    from safetensors.torch import load_file

    import lavis_svp.models  # noqa: F401  (LAVIS and the registrations)
    from lavis_svp.export.language_folder import merge_adapters, write_language_folder
    from lavis_svp.export.parity import compare, observe
    from lavis_svp.models.options import parse_model_options
    from lavis_svp.models.pretrained import find_weights
    from lavis_svp.models.svp_ris import SvpRis

    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out, or delete it.")
    path = find_weights(checkpoint)
    section = model_section(path, cfg_path, options)
    model = SvpRis.from_config(section).eval()
    scale = model.language.embedding_std  # of the weights that the configuration names, before the trained ones come
    model.load_checkpoint(str(path))
    print(f"Checkpoint: {path}", flush=True)
    before = observe(model)
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        merged = merge_adapters(model.language.transformer)
        write_language_folder(model.language, work, getattr(torch, dtype), shard_size)
        _save_tensors(svp_state(model), work / SVP_WEIGHTS)
        exported = exported_section(section, model, out.resolve(), scale)
        (work / SVP_YAML).write_text(HEADER + _yaml({"model": exported}), encoding="utf-8")
        parse_model_options(exported)  # what stands in the file can be read back
        del model
        again = SvpRis.from_config(_omegaconf({**_moved(exported, work), "load_finetuned": False})).eval()
        rows = seg_row_difference(again, load_file(work / SVP_WEIGHTS))  # those of the folder, as others will read it
        again.load_checkpoint(str(work / SVP_WEIGHTS))
        difference = compare(before, observe(again))
        del again
        print(f"Merged {merged} adapters. Exported against trained: {difference}; [SEG] rows {rows:.2e}.", flush=True)
        if not all(value <= TOLERANCES[dtype] for value in (difference.tokens, difference.masks, rows)):  # nor nan
            raise ValueError(
                f"The exported model is not the trained one: the difference is above {TOLERANCES[dtype]:g} "
                f"({dtype}). Nothing was written to {out}."
            )
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner may read
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: equal within {TOLERANCES[dtype]:g} ({dtype}). Use it with the model section in {out / SVP_YAML}.")


def svp_state(model: SvpRis) -> dict[str, Tensor]:
    """All of a model that neither the language model's folder nor the named weights hold.

    Args:
        model: with its checkpoint loaded.
    """
    state = dict(model.checkpoint_state())
    state.update((name, p.detach()) for name, p in model.named_parameters() if name.startswith(SVP_MODULES))
    return {name: tensor for name, tensor in state.items() if not name.startswith(LANGUAGE_FILES)}


def seg_row_difference(model: SvpRis, state: Mapping[str, Tensor]) -> float:
    """Largest difference of the ``[SEG]`` rows of a model from those of a state, as a share of the largest value."""
    names = [name for name in state if name.startswith("language.added_")]
    own = dict(model.named_parameters())
    return max(float((own[name].detach() - state[name]).abs().max() / state[name].abs().max()) for name in names)


def exported_section(section: Any, model: SvpRis, folder: Path, embedding_std: float) -> dict[str, Any]:
    """The model section that loads an export: the trained model's, with the language model of the folder.

    Args:
        section: the trained model's, for LAVIS's own keys.
        model: gives all options with their defaults filled in.
        folder: where the export will be.
        embedding_std: scale of visual tokens that the model was built with; the folder's embeddings may have another.
    """
    options = json.loads(json.dumps(dataclasses.asdict(model.options)))  # tuples become lists
    options["language"] |= {
        "name": str(folder),
        "num_layers": None,
        "tuning": "frozen",
        "train_embeddings": "added",
        "embedding_std": embedding_std,
    }
    lavis = {
        "arch": section.get("arch", "svp_ris"),
        "model_type": section.get("model_type", "tiny"),
        "load_pretrained": False,
        "pretrained": "",
        "load_finetuned": True,
        "finetuned": str(folder / SVP_WEIGHTS),
    }
    return {**lavis, **options, "trainable": None, "learning_rates": {}}


def model_section(path: Path, cfg_path: str | None, options: Sequence[str]) -> Any:
    """The model section that a checkpoint belongs to, set to load no weights but the named ones.

    Args:
        path: the checkpoint.
        cfg_path: the project YAML; None = the configuration stored in the checkpoint.
        options: overrides, as ``--options``.

    Raises:
        ValueError: no project YAML, and the checkpoint stores none.
    """
    from omegaconf import OmegaConf

    from lavis_svp.common.checkpoints import read_checkpoint

    if cfg_path:
        project = launch.read_project(cfg_path, options)
        launch.weights_from_checkpoint(project)
        return launch.build_config(project).model_cfg
    stored = read_checkpoint(path).get("config")
    if stored is None:
        raise ValueError(f"{path} holds no configuration; name the project YAML with --cfg-path.")
    project = OmegaConf.merge(stored, OmegaConf.from_dotlist(launch.dot_list(options)))
    launch.weights_from_checkpoint(project)
    return project.model


def _moved(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The section for a folder that is not at its final place yet."""
    language = {**section["language"], "name": str(folder)}
    return {**section, "language": language, "finetuned": str(folder / SVP_WEIGHTS)}


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, path)


def _omegaconf(values: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(values)


def _yaml(values: dict[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(values))
