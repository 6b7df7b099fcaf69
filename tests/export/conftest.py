"""Tiny language models of several kinds."""

from __future__ import annotations

import pytest

PADDING = 40  # rows of a table beyond the tokenizer


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory, tiny_llama, wide_llama, weights):
    """language_folder(kind): tied, untied, wide, qwen (tied, its table padded beyond the tokenizer), the real smollm2.

    Matrices of "wide" are large enough for bitsandbytes.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    made = {"tied": tiny_llama, "wide": wide_llama}

    def make(kind):
        if kind == "smollm2":
            return weights("smollm2_135m_instruct")
        if kind in made:
            return made[kind]
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        sizes = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id,
        }  # fmt: skip
        torch.manual_seed(0)
        if kind == "qwen":
            config = Qwen2Config(vocab_size=len(tokenizer) + PADDING, tie_word_embeddings=True, **sizes)
            model = Qwen2ForCausalLM(config)
        else:
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes))
        made[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
        return made[kind]

    return make
