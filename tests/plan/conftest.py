"""Skeletons of the tiny parts: the same modules that the tests of the model run with weights."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, LlamaConfig

from lavis_svp.models.config import parse_model_options
from lavis_svp.models.svp_ris import SvpRis


@pytest.fixture(scope="session")
def small_parts(tmp_path_factory):
    """Folders with a config.json alone: no weights, no tokenizer."""
    llama, dino = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("dino")
    LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ).save_pretrained(llama)
    Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    ).save_pretrained(dino)
    return {"llama": str(llama), "dino": str(dino)}


@pytest.fixture(scope="session")
def small_options(small_parts, random_head):
    """``small_options(**sections)``: options of a small model; nested sections are merged.

    The head of ``one_pass`` is a random one.
    """
    from omegaconf import OmegaConf

    def make(**sections):
        base = {
            "vision_encoder": {"name": small_parts["dino"], "side": 84},
            "sam": {"side": 128},
            "superpixels": {"name": "sam", "points_per_side": 8},
            "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
            "language": {"name": small_parts["llama"], "tuning": "frozen"},
        }
        for whole in ("projector", "superpixels"):
            if whole in sections:
                base.pop(whole)
        if sections.get("superpixels", {}).get("name") == "one_pass":
            base["superpixels"] = {"head": random_head}
        return parse_model_options(OmegaConf.merge(base, sections))

    return make


@pytest.fixture(scope="session")
def small_skeleton(small_options):
    def build(**sections):
        torch.manual_seed(0)
        return SvpRis.skeleton(small_options(**sections))

    return build
