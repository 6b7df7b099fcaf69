"""SmolLM2's tokenizer from the vocabulary that its GGUF file holds."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedTokenizerFast

CONTROL = 3  # GGUF's type of tokens that are not text


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that the file calls "smollm".

    transformers' own GGUF loader (4.57) makes a Llama tokenizer of it, which puts ``<|im_start|>`` before every text,
    ends at that same token, and does not cut numbers into digits. The file says: no such prefix, end and padding
    ``<|im_end|>``, digits cut apart. Six control characters and some code points above U+FFFF are not in the
    vocabulary and vanish.

    Args:
        fields: the GGUF file's metadata.

    Raises:
        ValueError: the file names another kind of tokenizer.
    """
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"The GGUF file's tokenizer is {kind}; only ('gpt2', 'smollm') is known here.")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = Sequence(pieces)
    tokenizer.decoder = ByteLevelDecoder()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL])

    def named(role: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{role}_token_id"]]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        pad_token=named("padding"),
        unk_token=named("unknown"),
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        model_input_names=["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
        clean_up_tokenization_spaces=False,
    )
