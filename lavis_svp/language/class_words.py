"""What an image classifier sees, said in the language model's own words.

A classifier's classes have names, and a language model has embeddings of these names. So a distribution over classes
becomes a point among the model's word embeddings without any training: ``sum_c p_c E(nouns of c)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lavis_svp.common.tensors import no_autocast
from lavis_svp.language.causal_lm import LanguageModel


class ClassWords(nn.Module):
    """Add to visual tokens the words for what a classifier sees in their regions.

    Args:
        words: (K, D) float32, see :func:`class_embeddings`.
        token_std: the standard deviation that a certain class's words are scaled to.
    """

    words: Tensor

    def __init__(self, words: Tensor, token_std: float) -> None:
        super().__init__()
        self.register_buffer("words", words, persistent=False)
        self.token_std = token_std
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """The tokens (B, T, D) with the words for the classes, whose log-probabilities are (B, T, K), added."""
        with no_autocast(tokens.device):
            words = self.words.float()
            expected = log_probs.float().exp() @ words  # (B, T, D)
            scale = self.token_std / words.square().mean().sqrt()  # a class that is certain: about token_std
            return tokens + (self.gate.float() * scale * expected).to(tokens.dtype)  # (B, T, D)


@torch.no_grad()
def class_embeddings(language: LanguageModel, class_nouns: Sequence[Sequence[str]]) -> Tensor:
    """The mean embedding of each class's nouns in a language model's table, less the mean over all classes.

    Args:
        language: with its tokenizer; without one (a skeleton) the result has its shape alone.
        class_nouns: for each of K classes its nouns.

    Returns:
        (K, D) float32.
    """
    table = language.embed_tokens.weight
    if table.is_meta:
        return torch.empty(len(class_nouns), language.dim, device="meta")
    nouns = sorted({noun for one in class_nouns for noun in one})
    ids = language.tokenizer([" " + noun for noun in nouns], add_special_tokens=False)["input_ids"]
    embedded = {noun: table[row].float().mean(0) for noun, row in zip(nouns, ids, strict=True)}  # (D,) each
    means = torch.stack([torch.stack([embedded[noun] for noun in one]).mean(0) for one in class_nouns])  # (K, D)
    return means - means.mean(0)
