"""The formulas of the language model's cost against counted operations, at a tiny size and with real passes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions
from lavis_svp.plan.flops import counted
from lavis_svp.plan.language import counted_forward, language_shape


@pytest.fixture(scope="module", params=["frozen", "lora", "full"])
def pair(request, tiny_llama):
    options = LanguageOptions(name=str(tiny_llama), tuning=request.param)
    return LanguageModel(options).eval(), LanguageModel(options, weights="none")


def really_counted(run):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counted(counter)


def test_prefill_and_decode_follow_the_formula(pair):
    real, skeleton = pair
    shape, length = language_shape(skeleton), 12
    assert shape == language_shape(real) or shape.vocabulary != language_shape(real).vocabulary
    cache = DynamicCache(config=real.config)
    embeddings = torch.randn(1, length, real.dim)
    prefill = really_counted(
        lambda: real(embeddings, torch.zeros(1, 1, length, length), torch.arange(length)[None], cache)
    )
    assert prefill.weights == shape.forward(length, length).weights
    rotary = 2 * length * (real.config.hidden_size // real.config.num_attention_heads) // 2
    assert prefill.mixing == shape.forward(length, length).mixing + rotary
    decode = really_counted(
        lambda: real(embeddings[:, :1], torch.zeros(1, 1, 1, length + 1), torch.full((1, 1), length), cache)
    )
    assert decode.weights == shape.forward(1, length + 1).weights
    assert decode.mixing == pytest.approx(shape.forward(1, length + 1).mixing, rel=0.05)
    counted_whole, states = counted_forward(skeleton, length)
    assert counted_whole == prefill and states == (1, length, real.dim)


def test_logits_follow_the_formula(pair):
    real, _ = pair
    counted_logits = really_counted(lambda: real.logits(torch.randn(7, real.dim)))
    assert counted_logits == language_shape(real).logits(7)


def test_what_trains_is_read_off_the_module(pair):
    real, skeleton = pair
    share = {"frozen": 0.0, "full": 1.0}.get(real.options.tuning)
    found = language_shape(skeleton).trained_share
    assert found == share if share is not None else 0 < found < 0.2
