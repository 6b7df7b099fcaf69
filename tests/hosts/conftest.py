"""Tiny random hosts of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

SIDE, PATCH = 48, 8


@pytest.fixture(scope="session")
def host_tokenizer(weights: Callable[[str], Path]) -> AutoTokenizer:
    """SmolLM2's tokenizer with LLaVA's placeholder."""
    tokenizer = AutoTokenizer.from_pretrained(weights("smollm2_135m_instruct"))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def llava(host_tokenizer: AutoTokenizer) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of two layers with a CLIP of two layers, 6 x 6 patches."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(host_tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision, text, image_token_index=host_tokenizer.convert_tokens_to_ids("<image>"))
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that what a picture holds changes what is said
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8.0)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(images, host_tokenizer, PATCH, "default", num_additional_image_tokens=1)
    return model, processor


def draw(seed: int, height: int = 60, width: int = 90) -> Image.Image:
    """Some rectangles on a plain ground."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), random.integers(0, 255, 3), np.uint8)
    for _ in range(3 + seed % 4):
        y, x = random.integers(0, height - 10), random.integers(0, width - 10)
        pixels[y : y + random.integers(8, 30), x : x + random.integers(8, 30)] = random.integers(0, 255, 3)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """``picture(seed, height=60, width=90)``: a PIL picture of some rectangles."""
    return draw
