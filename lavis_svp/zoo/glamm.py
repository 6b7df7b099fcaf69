"""Split GLaMM's and LISA's checkpoints: the language model as a plain folder, the rest under this package's names.

Both publish one Hugging Face folder with language model, segmenter and projectors under their own class names
(groundingLMM at e74865f, LISA at 3cb2d43; LISA's segmenter is called ``visual_model``). Training that starts from one,
such as GLaMM-GranD-Pretrained, begins with a language model and a mask decoder that know ``[SEG]``.
"""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavis_svp.common.files import BadFileError, file_errors, read_json

MEND = "Fetch it again."
LANGUAGE_FOLDER, SVP_FILE, RECORD = "language", "svp.safetensors", "import.json"
SEG_TOKEN = "[SEG]"
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|input_layernorm|post_attention_layernorm"
LANGUAGE = re.compile(rf"model\.(?:layers\.\d+\.(?:{LINEAR})|norm|embed_tokens)\.weight|lm_head\.weight")
SEGMENTER = r"model\.(?:grounding_encoder|visual_model)"
RENAMED = (
    (re.compile(r"model\.text_hidden_fcs\.0\.([02])\.(weight|bias)"), r"readout.mlp.\1.\2"),
    (re.compile(rf"{SEGMENTER}\.mask_decoder\.(.+)"), r"mask_head.mask_decoder.\1"),
)
PROJECTOR = (re.compile(r"model\.mm_projector\.([02])\.(weight|bias)"), r"projector.head.\1.\2")
DROPPED = (
    (re.compile(r"model\.vision_tower\..+"), "CLIP, frozen: built from its own weights"),
    (re.compile(r"model\.mm_projector\..+"), "made for CLIP's patches; kept with --with-projector"),
    (re.compile(r"model\.region_encoder\..+"), "works on boxes, which referring segmentation does not have"),
    (re.compile(rf"{SEGMENTER}\.(?:image_encoder|prompt_encoder)\..+"), "SAM's own, frozen: built from SAM's file"),
    (re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"), "computed from the configuration"),
)
CONFIG_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling", "bos_token_id",
    "eos_token_id", "tie_word_embeddings",
)  # fmt: skip
"""Entries of ``config.json`` that belong to LLaMA; the others describe the parts that are split off."""


@dataclass
class ImportReport:
    """The destination of every tensor of a checkpoint."""

    seg_id: int  # of [SEG] in the checkpoint
    vocabulary: int  # number of kept rows of the embedding and output tables
    language: list[str] = field(default_factory=list)  # names in the language model's folder, unchanged
    renamed: dict[str, str] = field(default_factory=dict)  # old name -> name in svp.safetensors
    dropped: dict[str, str] = field(default_factory=dict)  # old name -> reason
    rows: dict[str, str] = field(default_factory=dict)  # added token -> destination of its row, or why it was dropped


def import_glamm(
    source: Path, target: Path, seg_id: int | None = None, with_projector: bool = False, progress: bool = True
) -> ImportReport:
    """Convert a folder of GLaMM's or LISA's form.

    ``target`` then holds ``language/``, a LLaMA for ``model.language.name``, cut to the tokenizer's own vocabulary;
    ``svp.safetensors`` for ``model.pretrained``: seg-prompt head, mask decoder and the rows of ``[SEG]``; and
    ``import.json``, which lists the destination of every tensor. One file of the source is in memory at a time. No code
    in it is executed.

    Args:
        source: a folder with ``config.json``, ``tokenizer.model`` and ``.bin`` or ``.safetensors`` files.
        target: must not exist; appears whole or not at all.
        seg_id: id of ``[SEG]``; None: from ``added_tokens.json`` or ``tokenizer_config.json``.
        with_projector: keep ``mm_projector`` for the projector ``mlp`` (types ``glamm_*``) with the same encoder.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: a part of the source is missing.
        FileExistsError: ``target`` exists.
        BadFileError: a file is damaged or holds more than tensors, or a tensor is unknown, missing or of another form.
        ValueError: the id of ``[SEG]`` is unknown.
    """
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    from lavis_svp.common.tensor_files import load_state, save_tensors

    if target.exists():
        raise FileExistsError(f"{target} exists already: give another folder, or delete it.")
    files = weight_files(source)
    config = _json(source / "config.json")
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise BadFileError(f"{source / 'config.json'}: num_hidden_layers is {layers!r}, no whole number. {MEND}")
    vocabulary = _vocabulary(source)
    added = added_tokens(source, vocabulary)
    seg_id = added.get(SEG_TOKEN) if seg_id is None else seg_id
    if seg_id is None or seg_id < vocabulary:
        raise ValueError(
            f"{source} does not contain the id of {SEG_TOKEN} beyond its {vocabulary} own tokens (got {seg_id}; added "
            f"tokens: {added or 'none'}): give --seg-id. GLaMM's is 32004."
        )
    report = ImportReport(seg_id, vocabulary)
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    language = work / LANGUAGE_FOLDER
    try:
        language.mkdir(parents=True)
        svp: dict[str, torch.Tensor] = {}
        index: dict[str, str] = {}
        for number, file in enumerate(tqdm(files, desc="files", disable=not progress), start=1):
            kept = {}
            for name, tensor in load_state(file).items():
                new_name = sort_tensor(name, report, with_projector)
                if new_name is None:
                    continue
                if name in (EMBEDDINGS, OUTPUT):
                    kept[name], row = _split_table(f"{source}: {name}", tensor, vocabulary, seg_id)
                    svp["language.added_embedding" if name == EMBEDDINGS else "language.added_output"] = row
                elif name in report.renamed:
                    svp[new_name] = tensor.clone()
                else:
                    kept[name] = tensor.contiguous()
            shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            index |= dict.fromkeys(kept, shard)
            if kept:
                save_file(kept, language / shard, metadata={"format": "pt"})
        _check_complete(report, layers, source)
        report.rows = {
            token: f"row {number}: " + ("to svp.safetensors" if number == seg_id else "dropped, no prompt here uses it")
            for token, number in {**added, SEG_TOKEN: seg_id}.items()
        }
        save_tensors(work / SVP_FILE, svp)
        _write(language / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        _write(language / "config.json", _llama_config(config, vocabulary))
        shutil.copyfile(source / "tokenizer.model", language / "tokenizer.model")
        _write(language / "tokenizer_config.json", _tokenizer_config(source))
        _write(work / RECORD, asdict(report))
        os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def sort_tensor(name: str, report: ImportReport, with_projector: bool) -> str | None:
    """Record the destination of a tensor and return its new name; None if it is dropped.

    Raises:
        BadFileError: GLaMM and LISA have no such tensor.
    """
    if LANGUAGE.fullmatch(name):
        report.language.append(name)
        return name
    for pattern, new_name in (*RENAMED, *([PROJECTOR] if with_projector else [])):
        if pattern.fullmatch(name):
            report.renamed[name] = pattern.sub(new_name, name)
            return report.renamed[name]
    for pattern, reason in DROPPED:
        if pattern.fullmatch(name):
            report.dropped[name] = reason
            return None
    hint = "Merge its adapters first." if "lora_" in name or name.startswith("base_model.") else ""
    raise BadFileError(f"GLaMM's and LISA's published checkpoints have no tensor '{name}'. {hint}".strip())


def weight_files(source: Path) -> list[Path]:
    """List the files with the weights in order: those of the index, or the single one.

    Raises:
        FileNotFoundError: there are none, or a file of the index is missing.
        BadFileError: the index is damaged, or names files outside the folder.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = source / f"{stem}.{ending}.index.json", source / f"{stem}.{ending}"
        if index.is_file():
            with file_errors(index, MEND):
                names = sorted(set(_json(index)["weight_map"].values()))
                if any(not name or "\0" in name or Path(name).name != name for name in names):
                    raise BadFileError(f"{index} names files outside its folder.")
            missing = [name for name in names if not (source / name).is_file()]
            if missing:
                raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, which its index names.")
            return [source / name for name in names]
        if single.is_file():
            return [single]
    raise FileNotFoundError(f"{source} holds neither model.safetensors nor pytorch_model.bin, nor an index of parts.")


def added_tokens(source: Path, vocabulary: int) -> dict[str, int]:
    """Read the tokens beyond the tokenizer's own vocabulary, with their ids."""
    tokens: dict[str, int] = {}
    own, config = source / "added_tokens.json", source / "tokenizer_config.json"
    if own.exists():
        with file_errors(own, MEND):
            tokens |= {token: operator.index(number) for token, number in _json(own).items()}
    if config.exists():
        with file_errors(config, MEND):
            decoder = _json(config).get("added_tokens_decoder", {})
            tokens |= {str(entry["content"]): int(number) for number, entry in decoder.items()}
    return {token: number for token, number in sorted(tokens.items(), key=lambda pair: pair[1]) if number >= vocabulary}


def _vocabulary(source: Path) -> int:
    """Count the pieces of the tokenizer's own vocabulary."""
    from sentencepiece import SentencePieceProcessor

    path = source / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no tokenizer.model (sentencepiece), as GLaMM and LISA have.")
    with file_errors(path, MEND):
        return int(SentencePieceProcessor(model_file=str(path)).get_piece_size())


def _split_table(name: str, table: Any, vocabulary: int, seg_id: int) -> tuple[Any, Any]:
    """Split a table into the rows of the tokenizer's own vocabulary (V, D) and that of ``[SEG]`` (1, D)."""
    if len(table) <= seg_id:
        raise BadFileError(
            f"{name} has {len(table)} rows, none for {SEG_TOKEN} at id {seg_id}: give the right --seg-id."
        )
    return table[:vocabulary].clone(), table[seg_id : seg_id + 1].clone()


def _check_complete(report: ImportReport, layers: int, source: Path) -> None:
    names = set(report.language)
    missing = sorted({EMBEDDINGS, OUTPUT, "model.norm.weight"} - names)
    present = {match[1] for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    missing += [f"model.layers.{number}" for number in range(layers) if str(number) not in present]
    parts = {new_name.split(".")[0] for new_name in report.renamed.values()}
    missing += sorted({"readout", "mask_head"} - parts)
    if missing:
        raise BadFileError(f"{source} lacks {', '.join(missing)}: is it a whole checkpoint of GLaMM or LISA?")


def _llama_config(config: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    kept = {key: config[key] for key in CONFIG_KEYS if key in config}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, **kept}


def _tokenizer_config(source: Path) -> dict[str, Any]:
    path = source / "tokenizer_config.json"
    original = _json(path) if path.is_file() else {}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": original.get("legacy", True),
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }


def report_lines(report: ImportReport) -> Iterator[str]:
    """Summarise the destinations of the tensors, grouped by the first parts of their names."""
    yield f"language model: {len(report.language)} tensors, vocabulary cut to {report.vocabulary} rows"
    groups: dict[str, int] = {}
    for old, new in report.renamed.items():
        old_group, new_group = (".".join(name.split(".")[:count]) for name, count in ((old, 3), (new, 2)))
        line = f"{old_group}.* -> {new_group}.*"
        groups[line] = groups.get(line, 0) + 1
    for old, reason in report.dropped.items():
        line = f"dropped {'.'.join(old.split('.')[:2])}.*: {reason}"
        groups[line] = groups.get(line, 0) + 1
    yield from (f"{line} ({count} tensors)" for line, count in groups.items())
    yield from (f"{token}, {destination}" for token, destination in report.rows.items())


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path, MEND)
    if not isinstance(content, dict):
        raise BadFileError(f"{path} holds no mapping. {MEND}")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
