"""Published architectures: the real classes have the published sizes, compared without memory for weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.zoo import PUBLISHED, model_config
from lavis_svp.zoo.store import weights_folder


def built(config):
    kind = AutoModelForCausalLM if config.model_type in ("llama", "qwen2") else AutoModel
    with torch.device("meta"):
        return kind.from_config(config)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_real_class_has_the_published_number_of_parameters(name):
    entry = PUBLISHED[name]
    config = AutoConfig.for_model(entry.model_type, **entry.values)
    assert sum(p.numel() for p in built(config).parameters()) == entry.parameters


@pytest.mark.parametrize("name", ["smollm2_135m_instruct", "dinov2_small_imgfocus"])
def test_embedded_weights_have_the_architecture_of_the_table(name, weights):
    stored = json.loads((weights(name) / "config.json").read_text())
    for key, value in PUBLISHED[name].values.items():
        assert stored[key] == pytest.approx(value, rel=1e-6), key
    assert model_config(name).to_dict()["hidden_size"] == stored["hidden_size"]


def test_embedded_architectures_need_no_download(own_cache):
    assert not weights_folder("smollm2_135m_instruct").exists()
    assert model_config("smollm2_135m_instruct").hidden_size == 576


def test_a_local_folder_counts_before_the_table(tiny_llama):
    assert model_config(tiny_llama).hidden_size == 32 and model_config(str(tiny_llama)).model_type == "llama"


def test_a_folder_without_config_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        model_config(tmp_path)


@pytest.mark.parametrize("name", ["lmsys/vicuna-7b", "nobody/nothing"])
def test_an_unknown_name_says_how_to_give_a_configuration(name):
    with pytest.raises(UnknownNameError, match=r"config\.json") as error:
        model_config(name)
    assert "lmsys/vicuna-7b-v1.5" in str(error.value)
