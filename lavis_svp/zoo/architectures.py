"""Architectures of published models, to build them on the meta device without weights and without the hub.

The values come from each model's ``config.json`` on the Hugging Face hub; ``parameters`` is the size of the
publisher's file. Tests build every model and compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lavis_svp.common.registry import unknown_name
from lavis_svp.zoo.entries import list_weights
from lavis_svp.zoo.published import read_published
from lavis_svp.zoo.store import is_cached, weights_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Weights = Literal["load", "none"]
"""How to build a part: with its pretrained weights, or on the meta device without weights."""


@dataclass(frozen=True)
class Architecture:
    """The shape of a published model."""

    model_type: str  # transformers' name
    values: Mapping[str, Any]  # entries of its config.json; the others have transformers' defaults
    parameters: int  # of a whole causal language model, or of CLIP's vision tower


def _llama(width: int, inner: int, layers: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _vit(width: int, layers: int, heads: int, image_size: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "image_size": image_size, "patch_size": 14, **more}


_CLIP_L = {"intermediate_size": 4096, "projection_dim": 768}
_LLAMA3 = {"num_key_value_heads": 8, "rope_theta": 500_000.0, "max_position_embeddings": 8192}
_LLAMA3_IDS = {"bos_token_id": 128_000, "eos_token_id": 128_001}
_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 32_768}
_SMOLLM = {"num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100_000.0}

PUBLISHED: Mapping[str, Architecture] = MappingProxyType(
    {
        # LLaMA-2's shape, arXiv 2307.09288
        "lmsys/vicuna-7b-v1.5": Architecture(
            "llama", _llama(4096, 11_008, 32, 32, 32_000, max_position_embeddings=4096), 6_738_415_616
        ),
        "lmsys/vicuna-13b-v1.5": Architecture(
            "llama", _llama(5120, 13_824, 40, 40, 32_000, max_position_embeddings=4096), 13_015_864_320
        ),
        # arXiv 2407.21783, table 3
        "meta-llama/Meta-Llama-3-8B": Architecture(
            "llama", _llama(4096, 14_336, 32, 32, 128_256, **_LLAMA3, **_LLAMA3_IDS), 8_030_261_248
        ),
        # arXiv 2412.15115, table 1
        "Qwen/Qwen2.5-7B-Instruct": Architecture(
            "qwen2", _llama(3584, 18_944, 28, 28, 152_064, **{**_QWEN, "num_key_value_heads": 4}), 7_615_616_512
        ),
        "Qwen/Qwen2.5-0.5B-Instruct": Architecture(
            "qwen2",
            _llama(896, 4864, 24, 14, 151_936, **{**_QWEN, "num_key_value_heads": 2}, tie_word_embeddings=True),
            494_032_768,
        ),
        # arXiv 2304.07193, table 17; with registers arXiv 2309.16588
        "facebook/dinov2-small": Architecture("dinov2", _vit(384, 12, 6, 518), 22_056_576),
        "facebook/dinov2-base": Architecture("dinov2", _vit(768, 12, 12, 518), 86_580_480),
        "facebook/dinov2-large": Architecture("dinov2", _vit(1024, 24, 16, 518), 304_368_640),
        "facebook/dinov2-with-registers-large": Architecture(
            "dinov2_with_registers", _vit(1024, 24, 16, 518, num_register_tokens=4), 304_372_736
        ),
        # vision_config of config.json; arXiv 2103.00020, table 20
        "openai/clip-vit-large-patch14": Architecture(
            "clip_vision_model", _vit(1024, 24, 16, 224, **_CLIP_L), 303_179_776
        ),
        "openai/clip-vit-large-patch14-336": Architecture(
            "clip_vision_model", _vit(1024, 24, 16, 336, **_CLIP_L), 303_507_456
        ),
        # what the zoo's converters write
        "smollm2_135m_instruct": Architecture(
            "llama", _llama(576, 1536, 30, 9, 49_152, **_SMOLLM, tie_word_embeddings=True), 134_515_008
        ),
        "dinov2_small_imgfocus": Architecture("dinov2", _vit(384, 12, 6, 518), 22_056_576),
    }
)

CLASSIFIERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "efficientnet_lite0": {
            "architecture": "tf_efficientnet_lite0",  # timm's name
            "num_classes": 1000,
            "num_features": 1280,
            "pretrained_cfg": {"mean": [127 / 255] * 3, "std": [128 / 255] * 3},  # of RGB in 0..1
        },
    }
)
"""The ``config.json`` of image classifiers, in timm's form, by the name of the zoo whose converter writes it."""


def model_config(name_or_path: str | PathLike[str]) -> PretrainedConfig:
    """Find the configuration of a transformers model without its weights and without a connection.

    Args:
        name_or_path: a local folder with a ``config.json``; a name of the zoo; a name of :data:`PUBLISHED`; or a hub
            id whose ``config.json`` lies in Hugging Face's cache on this machine.

    Raises:
        FileNotFoundError: the local folder has no ``config.json``.
        BadFileError: it is damaged, or of a kind that transformers does not know.
        UnknownNameError: the name is none of these; the message says how to give a configuration.
    """
    from transformers import AutoConfig

    name, folder = fspath(name_or_path), Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json, which describes its model.")
        return read_published(AutoConfig.from_pretrained, folder)
    if name in {entry.name for entry in list_weights()} and is_cached(name):
        return read_published(AutoConfig.from_pretrained, weights_folder(name))
    if name in PUBLISHED:
        return AutoConfig.for_model(PUBLISHED[name].model_type, **PUBLISHED[name].values)
    try:
        return read_published(AutoConfig.from_pretrained, name, local_files_only=True)
    except OSError:
        error = unknown_name("architecture", name, PUBLISHED)
        raise type(error)(
            f"{error} For another model give a local folder that holds its config.json (weights are not needed), "
            "or download that file into Hugging Face's cache."
        ) from None
