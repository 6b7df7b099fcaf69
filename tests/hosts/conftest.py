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
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
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
    model = _louder(LlavaForConditionalGeneration(config))
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(images, host_tokenizer, PATCH, "default", num_additional_image_tokens=1)
    return model, processor


@pytest.fixture(scope="session")
def qwen_tokenizer(weights: Callable[[str], Path]) -> Qwen2TokenizerFast:
    """SmolLM2's tokenizer in Qwen's class, with Qwen's special tokens."""
    plain = AutoTokenizer.from_pretrained(weights("smollm2_135m_instruct"))
    tokenizer = Qwen2TokenizerFast(tokenizer_object=plain.backend_tokenizer, pad_token=plain.eos_token)
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def qwen_of(tokenizer: Qwen2TokenizerFast, config_class, model_class, processor_class, vision: dict):
    """A Qwen of two layers with a tower of two, images of up to 12 x 12 patches."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    config = config_class(text, {"depth": 2, "num_heads": 4, "patch_size": PATCH, **vision}, *map(ids, special))
    model = model_class(config).eval()
    with torch.no_grad():  # so that what an image holds, and where, changes what is said
        for parameter in model.model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    limits = {"min_pixels": (4 * PATCH) ** 2, "max_pixels": (12 * PATCH) ** 2}
    images = Qwen2VLImageProcessor(patch_size=PATCH, **limits)
    videos = Qwen2VLVideoProcessor(patch_size=PATCH, **limits)
    return model, processor_class(images, tokenizer, videos)


@pytest.fixture(scope="session")
def qwen(qwen_tokenizer: Qwen2TokenizerFast) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """A Qwen2.5-VL whose tower has a block with windows of 2 x 2 cells and one without."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    }  # fmt: skip
    classes = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)
    return qwen_of(qwen_tokenizer, *classes, vision)


@pytest.fixture(scope="session")
def qwen2(qwen_tokenizer: Qwen2TokenizerFast) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    """A Qwen2-VL, whose tower knows no windows and is narrower than its language model."""
    classes = (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)
    return qwen_of(qwen_tokenizer, *classes, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2})


def draw(seed: int, height: int = 60, width: int = 90) -> Image.Image:
    """Some rectangles on a plain ground."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), random.integers(0, 255, 3), np.uint8)
    for _ in range(3 + seed % 4):
        y, x = random.integers(0, height - 10), random.integers(0, width - 10)
        pixels[y : y + random.integers(8, 30), x : x + random.integers(8, 30)] = random.integers(0, 255, 3)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def image() -> Callable[..., Image.Image]:
    """``image(seed, height=60, width=90)``: a PIL image of some rectangles."""
    return draw


TILED_SIDE, TILED_PATCH = 28, 9  # 3 x 3 patches a view, and one pixel that belongs to none, as in SigLIP-SO400M's 384
PINPOINTS = [[28 * rows, 28 * columns] for rows, columns in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


@pytest.fixture(scope="session")
def llava_next(host_tokenizer: AutoTokenizer) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """A LLaVA-NeXT of two layers with a CLIP of three, views of 3 x 3 patches, up to four of them and a base view."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=TILED_SIDE,
        patch_size=TILED_PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(host_tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    image_token = host_tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaNextConfig(vision, text, image_token_index=image_token, image_grid_pinpoints=PINPOINTS)
    model = _louder(LlavaNextForConditionalGeneration(config))
    crop = {"height": TILED_SIDE, "width": TILED_SIDE}
    images = LlavaNextImageProcessor(size={"shortest_edge": TILED_SIDE}, crop_size=crop, image_grid_pinpoints=PINPOINTS)
    return model, LlavaNextProcessor(images, host_tokenizer, TILED_PATCH, "default", num_additional_image_tokens=1)


@pytest.fixture(scope="session")
def llava_onevision(
    host_tokenizer: AutoTokenizer,
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """A LLaVA-OneVision of two layers with a SigLIP of three; canvases of more than two views are pooled."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=TILED_SIDE,
        patch_size=TILED_PATCH, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(host_tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    image_token = host_tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision, text, image_token_index=image_token, image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2", tie_word_embeddings=True,
    )  # fmt: skip
    model = _louder(LlavaOnevisionForConditionalGeneration(config))
    size = {"height": TILED_SIDE, "width": TILED_SIDE}
    images = LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS)
    processor = LlavaOnevisionProcessor(
        images, host_tokenizer, LlavaOnevisionVideoProcessor(size=size), num_image_tokens=9,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return model, processor


def _louder(model: PreTrainedModel) -> PreTrainedModel:
    """So that what an image holds changes what is said."""
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8.0)
    return model.eval()
