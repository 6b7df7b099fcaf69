"""Memory: shares of the states by hand, what autograd keeps against real tensors."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions
from lavis_svp.plan.flops import language_shape
from lavis_svp.plan.memory import (
    CONTEXT,
    boundary_head_bytes,
    frozen_bytes,
    kept_bytes,
    layer_bytes,
    memory_per_gpu,
    quantised_weights,
    state_bytes,
)
from lavis_svp.plan.settings import TextLengths, TrainingSettings

TEXT = TextLengths(prefix=10, question=12, answer=5)
TRAINING = TrainingSettings(
    images=1000, data="", expressions=3, batch_size=2, accumulation=1, steps=10, zero=2, dtype="bf16", zero_options={}
)
TOTAL, TRAINED = 1_000_000, 100_000
DTYPES = ("bf16", "fp16", "fp32")


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [
        (0, 2 * TOTAL, 2 * TRAINED, 12 * TRAINED),
        (1, 2 * TOTAL, 2 * TRAINED, 3 * TRAINED),
        (2, 2 * TOTAL, TRAINED / 2, 3 * TRAINED),
        (3, TOTAL / 2, TRAINED / 2, 3 * TRAINED),
        (None, 4 * TOTAL + 2 * TRAINED, 4 * TRAINED, 8 * TRAINED),
    ],
)
def test_states_by_zero_stage_on_four_gpus(zero, weights, gradients, optimizer):
    found = state_bytes(TOTAL, TRAINED, dataclasses.replace(TRAINING, zero=zero), 4)
    assert found[:3] == (weights, gradients, optimizer)


@given(zero=st.integers(0, 2), gpus=st.integers(1, 64), trained=st.integers(1, TOTAL), dtype=st.sampled_from(DTYPES))
def test_a_higher_stage_or_more_gpus_never_take_more(zero, gpus, trained, dtype):
    lower = dataclasses.replace(TRAINING, zero=zero, dtype=dtype)
    higher = dataclasses.replace(TRAINING, zero=zero + 1, dtype=dtype)
    held = sum(state_bytes(TOTAL, trained, lower, gpus)[:3])
    assert sum(state_bytes(TOTAL, trained, higher, gpus)[:3]) <= held
    assert sum(state_bytes(TOTAL, trained, lower, gpus + 1)[:3]) <= held


def test_what_zero_3_leaves_whole_is_on_every_gpu():
    stage3 = dataclasses.replace(TRAINING, zero=3)
    assert state_bytes(TOTAL, TRAINED, stage3, 4, unsharded=200_000)[0] == 2 * (200_000 + 800_000 / 4)
    assert state_bytes(TOTAL, TRAINED, TRAINING, 4, unsharded=200_000)[0] == 2 * TOTAL


def test_the_frozen_encoders_stay_in_float32_at_every_stage():
    stage3 = dataclasses.replace(TRAINING, zero=3)
    assert state_bytes(TOTAL, TRAINED, TRAINING, 4, replicated=200_000)[0] == 4 * 200_000 + 2 * 800_000
    assert state_bytes(TOTAL, TRAINED, stage3, 4, replicated=200_000)[0] == 4 * 200_000 + 2 * 800_000 / 4
    offloaded = dataclasses.replace(stage3, zero_options={"offload_param": {"device": "cpu"}})
    assert state_bytes(TOTAL, TRAINED, offloaded, 4, replicated=200_000)[0] == 4 * 200_000


def test_fp32_offload_and_buckets():
    fp32 = state_bytes(TOTAL, TRAINED, dataclasses.replace(TRAINING, dtype="fp32"), 4)
    assert fp32[:3] == (4 * TOTAL, TRAINED, 2 * TRAINED)
    options = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme"}, "reduce_bucket_size": 1000}
    offloaded = state_bytes(TOTAL, TRAINED, dataclasses.replace(TRAINING, zero=3, zero_options=options), 4)
    assert (offloaded[0], offloaded[2]) == (0, 0) and offloaded[3] == 2 * (1000 + TOTAL)


def test_kept_tensors_are_those_of_autograd():
    first, second = nn.Linear(6, 8), nn.Linear(8, 4)
    x = torch.randn(5, 6)
    kept = kept_bytes(lambda: second(torch.relu(first(x))), [*first.parameters(), *second.parameters()])
    assert kept == 4 * (5 * 6 + 5 * 8)  # the input, and relu's output, which the second layer keeps as well
    first.requires_grad_(False)
    assert kept_bytes(lambda: second(torch.relu(first(x))), [*first.parameters(), *second.parameters()]) == 4 * 5 * 8


@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_a_layers_memory_is_that_of_a_real_pass(tiny_llama, tuning):
    """Counted without weights, against the same hooks on a real one-layer model on the CPU."""
    options = LanguageOptions(name=str(tiny_llama), tuning=tuning, num_layers=1)
    real = LanguageModel(options)
    states = torch.randn(2, 9, real.dim, requires_grad=True)
    mask, positions = torch.zeros(2, 1, 9, 9), torch.arange(9)[None].expand(2, -1)
    measured = kept_bytes(lambda: real(states, mask, positions), real.transformer.parameters())
    skeleton = LanguageModel(dataclasses.replace(options, num_layers=None), weights="none")
    assert layer_bytes(skeleton, 2, 9, "fp32") == pytest.approx(measured, rel=0.02)
    assert layer_bytes(skeleton, 2, 9, "bf16") < 0.8 * measured
    assert next(skeleton.transformer.parameters()).is_meta


def estimate(model, training=TRAINING, tokens=9, gpus=2):
    return memory_per_gpu(model, language_shape(model.language), tokens, TEXT, training, gpus)


def test_more_tokens_images_and_layers_kept_take_more(small_skeleton):
    model = small_skeleton()
    base = estimate(model)
    assert estimate(model, tokens=36).language > base.language
    assert estimate(model, dataclasses.replace(TRAINING, batch_size=4)).language == pytest.approx(
        2 * base.language, rel=0.01
    )
    assert estimate(model, dataclasses.replace(TRAINING, expressions=6)).heads > 1.5 * base.heads
    checkpointed = estimate(small_skeleton(language={"gradient_checkpointing": True}))
    assert checkpointed.language < 0.7 * base.language
    assert base.peak >= CONTEXT + base.weights + max(base.frozen, base.language + base.heads)


def test_weights_in_16_bits_take_half():
    stage2, plain = TRAINING, dataclasses.replace(TRAINING, zero=None)
    held = [state_bytes(TOTAL, TRAINED, one, 4, replicated=200_000)[0] for one in (stage2, plain)]
    half = {"replicated": 200_000, "half_encoders": 150_000, "half_language": 600_000}
    assert state_bytes(TOTAL, TRAINED, stage2, 4, **half)[0] == held[0] - 2 * 150_000
    assert state_bytes(TOTAL, TRAINED, plain, 4, **half)[0] == held[1] - 2 * 750_000


def test_dtype_and_superpixels_from_a_store_lower_the_estimate(small_skeleton):
    usual = estimate(small_skeleton())
    full = {"vision_encoder": {"dtype": "float32"}, "sam": {"dtype": "float32"}, "language": {"dtype": "float32"}}
    assert estimate(small_skeleton(**full)).weights > usual.weights
    assert estimate(small_skeleton(superpixels={"name": "sam", "cache": "read"})).frozen < usual.frozen


def test_a_boundary_head_takes_all_images_together(small_skeleton):
    model = small_skeleton(superpixels={"name": "one_pass"})
    one, four = (estimate(model, dataclasses.replace(TRAINING, batch_size=count)).frozen for count in (1, 4))
    assert 4 * one == four > 0
    assert boundary_head_bytes(model.extractor.generator.loaded.head, 256) == one * 4  # all are convolutions
    assert estimate(small_skeleton(superpixels={"name": "one_pass", "cache": "read"})).frozen == 0
    assert one < 0.1 * estimate(small_skeleton()).frozen


LINEAR = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # of the small model's three layers
ROWS = 3 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


@pytest.mark.parametrize(
    ("quantization", "held"), [("8bit", LINEAR + 4 * ROWS), ("4bit", LINEAR / 2 + 4 * LINEAR / 64)]
)
@pytest.mark.parametrize(("dtype", "zero", "width"), [("bfloat16", 2, 2), ("bfloat16", None, 2), ("float32", None, 4)])
def test_quantised_matrices_take_a_byte_or_half_of_one(small_skeleton, quantization, held, dtype, zero, width):
    training = dataclasses.replace(TRAINING, zero=zero)
    language = {"tuning": "lora", "dtype": dtype}
    found = [
        estimate(small_skeleton(language={**language, "quantization": name}), training).weights
        for name in ("none", quantization)
    ]
    assert found[0] - found[1] == pytest.approx(width * LINEAR - held)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_bytes_are_those_that_bitsandbytes_holds(wide_llama, quantization):
    options = LanguageOptions(str(wide_llama), quantization=quantization)
    real = LanguageModel(options, device="cpu")
    matrices = [p for p in real.transformer.parameters() if not p.is_floating_point()]
    scales = [one.SCB if quantization == "8bit" else one.quant_state.absmax for one in matrices]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*matrices, *scales))
    assert quantised_weights(LanguageModel(options, "none"))[1] == held


def test_stored_features_need_no_moment_of_the_frozen_half(small_skeleton):
    assert estimate(small_skeleton(cache_features=True)).frozen == 0
    assert estimate(small_skeleton()).frozen > 0


def test_the_frozen_halfs_moment_is_sams_global_attention(small_options):
    from lavis_svp.models.svp_ris import SvpRis

    model = SvpRis.skeleton(small_options(sam={"name": "sam_vit_b_01ec64.pth", "side": 512}, projector={"name": "mlp"}))
    assert frozen_bytes(model) == 12 * 1024**2 * 3 * 2  # heads, tokens², numbers, bytes; one image at a time
