"""What a classifier sees as words of the language model, against a plain loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lavis_svp.language.class_words import ClassWords, class_embeddings

DIM = 8
NOUNS = [["dog", "pet"], ["cat"], ["tea cup", "pet", "dog"]]


def tokenizer(texts, add_special_tokens):
    """A token a letter."""
    assert not add_special_tokens and all(text.startswith(" ") for text in texts)
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@pytest.fixture
def language():
    torch.manual_seed(0)
    return SimpleNamespace(embed_tokens=torch.nn.Embedding(128, DIM), tokenizer=tokenizer, dim=DIM)


def test_embeddings_equal_a_plain_loop(language):
    table = language.embed_tokens.weight
    means = []
    for nouns in NOUNS:
        rows = [sum(table[ord(letter)] for letter in " " + noun) / (1 + len(noun)) for noun in nouns]
        means.append(sum(rows) / len(rows))
    overall = sum(means) / len(means)
    found = class_embeddings(language, NOUNS)
    torch.testing.assert_close(found, torch.stack([mean - overall for mean in means]))
    assert not found.requires_grad and found.dtype == torch.float32


def test_a_skeleton_gets_their_shape_alone():
    with torch.device("meta"):
        table = torch.nn.Embedding(128, DIM)
    found = class_embeddings(SimpleNamespace(embed_tokens=table, dim=DIM), NOUNS)
    assert found.is_meta and found.shape == (3, DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_get_the_expected_words(language, dtype):
    words, std = class_embeddings(language, NOUNS), 0.3
    layer = ClassWords(words, std)
    tokens, log_probs = torch.randn(2, 4, DIM).to(dtype), torch.randn(2, 4, 3).log_softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        found = layer(tokens, log_probs)
    root = float(words.square().mean()) ** 0.5
    for b in range(2):
        for t in range(4):
            expected = sum(float(log_probs[b, t, k].exp()) * words[k] for k in range(3)) * std / root
            torch.testing.assert_close(found[b, t], tokens[b, t] + expected.to(dtype))
    assert found.dtype == dtype


def test_a_certain_class_is_about_as_large_as_a_token_and_the_gate_learns(language):
    layer = ClassWords(class_embeddings(language, NOUNS), 0.3)
    certain = torch.full((1, 3, 3), -40.0)
    certain[0, range(3), range(3)] = 0
    added = layer(torch.zeros(1, 3, DIM), certain)
    assert added.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-3)
    added.square().sum().backward()
    assert layer.gate.grad.abs() > 0 and list(layer.state_dict()) == ["gate"]  # the words are the language model's
    with torch.no_grad():
        layer.gate.zero_()
    assert not layer(torch.zeros(1, 3, DIM), certain).any()
