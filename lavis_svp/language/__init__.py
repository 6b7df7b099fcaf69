"""The causal language model: special tokens, prompts, splicing visual tokens into text, generation."""
