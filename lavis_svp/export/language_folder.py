"""The language model of a trained SVP as a plain Hugging Face folder, ``[SEG]`` in its tokenizer and its tables."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lavis_svp.language.causal_lm import LanguageModel


def merge_adapters(transformer: nn.Module) -> int:
    """Add every LoRA adapter to the layer it sits on, by peft's own merge, and put the plain layers back.

    Args:
        transformer: changed in place.

    Returns:
        How many adapters there were.

    Raises:
        ValueError: an adapter holds numbers that are not finite (peft's check).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        transformer.set_submodule(name, module.get_base_layer())
    return len(adapted)


def with_row(table: Tensor, index: int, row: Tensor) -> Tensor:
    """A copy of a table with one row set; it grows by that row if it ends just before it.

    Args:
        table: (V, D).
        index: of the row; below V where the table is padded beyond the tokenizer, or V.
        row: (1, D).

    Raises:
        ValueError: there would be a gap between the table and the row.
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

    ``AutoModelForCausalLM.from_pretrained(folder)`` gives a model that reads and says ``[SEG]`` as an ordinary token.

    Args:
        language: without adapters (:func:`merge_adapters`).
        folder: written into; must exist.
        dtype: of the weights in the files.
        shard_size: largest file, as Hugging Face writes it ("5GB").
    """
    config = copy.deepcopy(language.config)
    table = with_row(language.embed_tokens.weight, language.seg_id, language.added_embedding)
    config.vocab_size = len(table)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    inner = {**language.transformer.state_dict(), "embed_tokens.weight": table}
    model.model.load_state_dict({name: tensor.to(dtype) for name, tensor in inner.items()}, assign=True)
    head = model.get_output_embeddings()
    if language.output is None or language.added_output is None:
        head.weight = model.get_input_embeddings().weight
    else:
        rows = with_row(language.output.weight, language.seg_id, language.added_output)
        head.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
        if language.output.bias is not None:
            raise ValueError("The output layer has a bias, which has no row for [SEG]; this export cannot place it.")
    model.save_pretrained(folder, max_shard_size=shard_size, safe_serialization=True)
    language.tokenizer.save_pretrained(folder)
