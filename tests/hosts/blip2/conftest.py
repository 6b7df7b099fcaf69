"""Tiny random BLIP-2s: LAVIS's EVA of two layers, OPT and T5 of two layers in local folders with real tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lavis_svp  # noqa: F401  (before LAVIS, which needs mending)

SIDE, PATCH, WIDTH = 56, 14, 32
CAPTIONS = ["a red cup", "two dogs on a large green field", "a cat"]


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT with a byte tokenizer in OPT's form: GPT-2's files, text begins with ``</s>``."""
    from transformers import OPTConfig, OPTForCausalLM
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    folder = tmp_path_factory.mktemp("opt")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokens = ["<s>", "<pad>", "</s>", *bytes_to_unicode().values()]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokens), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, pad_token_id=1, bos_token_id=2, eos_token_id=2,
            init_std=0.5,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 in Flan's form (gated, output layer of its own) with a sentencepiece tokenizer."""
    from sentencepiece import SentencePieceTrainer
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer, T5TokenizerFast

    folder = tmp_path_factory.mktemp("t5")
    (folder / "text.txt").write_text("\n".join([*CAPTIONS, "Question: what is red? Short answer: the cup"] * 20))
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"), vocab_size=60, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    slow = T5Tokenizer(str(folder / "spiece.model"), extra_ids=0, legacy=True)
    slow.save_pretrained(folder)
    T5TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(slow), d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=3.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_eva() -> Any:
    """LAVIS's EVA ViT, 4 x 4 patches."""
    from functools import partial

    from lavis.models.eva_vit import VisionTransformer
    from torch import nn

    torch.manual_seed(1)
    return VisionTransformer(
        img_size=SIDE, patch_size=PATCH, use_mean_pooling=False, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2,
        qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip


@pytest.fixture
def tiny_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAVIS's own ``init_vision_encoder`` gives a tiny EVA in place of the one it downloads."""
    from lavis.models.blip2_models import blip2

    monkeypatch.setattr(blip2, "create_eva_vit_g", lambda *args: tiny_eva())


@pytest.fixture
def make(tiny_vit: None, opt_folder: Path, t5_folder: Path) -> Callable[..., Any]:
    """``make("opt", **sections)``: a fresh model in evaluation mode, its tokens large enough to change what is said."""
    from lavis.common.registry import registry
    from omegaconf import OmegaConf

    def build(kind: str, **sections: Any) -> Any:
        base = {
            "image_size": SIDE,
            "vit_precision": "fp32",
            "lm_precision": "fp32",
            "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8, "token_std": 2.0},
            "superpixels": {"name": "felzenszwalb", "side": SIDE},
            f"{kind}_model": str({"opt": opt_folder, "t5": t5_folder}[kind]),
        }
        torch.manual_seed(2)
        cls = registry.get_model_class(f"blip2_{kind}_svp")
        return cls.from_config(OmegaConf.create({**base, **sections})).eval()

    return build


def images() -> Tensor:
    """Three processed images with 1, 2 and more superpixels, as LAVIS's processors give them."""
    from lavis.processors.blip_processors import BlipImageBaseProcessor

    pixels = torch.full((3, 3, SIDE, SIDE), 0.2)
    pixels[1, 0, :, : SIDE // 2] = 0.9
    pixels[2, 1, : SIDE // 2] = 0.8
    pixels[2, 2, :, SIDE // 2 :] = 0.9
    pixels[2, 0, 10:30, 10:30] = 1.0
    return BlipImageBaseProcessor().normalize(pixels)


@pytest.fixture
def samples() -> dict[str, Any]:
    return {
        "image": images(),
        "image_id": ["7", "8", "9"],
        "question_id": torch.tensor([70, 80, 90]),
        "text_input": ["a red cup", "two dogs on a large green field", "a cat"],
        "text_output": ["the cup", "two dogs", "a"],
    }


@pytest.fixture
def one_by_one() -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Cut a batch into batches of one."""
    return lambda batch: [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["image"]))]
