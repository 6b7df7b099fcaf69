"""A whole svp_ris with tiny random parts: Llama of width 32, DINOv2 of width 32, MobileSAM at side 128."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_dinov2")
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    ).save_pretrained(folder)
    return {"llama": tiny_llama, "dinov2": folder}


@pytest.fixture(scope="session")
def make_model(tiny_parts: dict[str, Path]) -> Callable[..., Any]:
    """``make_model(**sections)``: a fresh model in training mode; sections override the tiny defaults."""
    import torch
    from omegaconf import OmegaConf

    def build(**sections: Any) -> Any:
        from lavis_svp.models.svp_ris import SvpRis

        base = {
            "vision_encoder": {"name": str(tiny_parts["dinov2"]), "side": 84},
            "sam": {"side": 128},
            "superpixels": {"name": "grid", "rows": 3, "cols": 3},
            "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
            "language": {"name": str(tiny_parts["llama"]), "tuning": "full", "train_embeddings": "added"},
            "prompt": {"style": "plain"},
            "layout": "packed",
        }
        for whole in ("projector", "superpixels"):  # other names have other options
            if whole in sections:
                base.pop(whole)
        torch.manual_seed(0)
        return SvpRis.from_config(OmegaConf.merge(base, sections)).train()

    return build


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two images, one of them not square, with three and one expressions; one has no target."""
    import torch

    rng = np.random.default_rng(0)
    sizes, inside = [(96, 128), (128, 128)], [(96, 128), (128, 128)]
    image = torch.zeros(2, 4, 128, 128)
    masks = []
    for index, (height, width) in enumerate(inside):
        image[index, :3, :height, :width] = torch.rand(3, height, width, generator=torch.Generator().manual_seed(index))
        image[index, 3, :height, :width] = 1
        mask = np.zeros(sizes[index], np.uint8)
        top, left = rng.integers(5, 40, 2)
        mask[top : top + 30, left : left + 40] = 1
        masks.append(mask)
    return {
        "image": image,
        "original_size": sizes,
        "text_input": [["the red cup", "a cat", "the large blue star on the left"], ["the circle"]],
        "masks": [[masks[0], np.zeros_like(masks[0]), masks[0]], [masks[1]]],
        "has_target": [[True, False, True], [True]],
        "instances": [{"labels": m.astype(np.int32) - 1, "words": [["red", "cup"]]} for m in masks],
    }
