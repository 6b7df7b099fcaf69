"""The full-scale stages' own choice of what trains, on parts of their kind at tiny size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lavis_svp.common.checkpoints import save_checkpoint
from lavis_svp.runners.project import read_project

ROOT = Path(__file__).resolve().parents[2]
TYPES = {1: "pretrain_vicuna7b", 2: "refcoco_vicuna7b"}
CHOICES = ("trainable", "projector", "language", "learning_rates")


@pytest.fixture(scope="module")
def untied_llama(tmp_path_factory, tiny_llama):
    """As Vicuna: the output layer is a table of its own."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untied_llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=False, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stage(make_model, untied_llama):
    """stage(number, **more): the model of a stage's YAML, its parts replaced by tiny ones of the same kind."""

    def build(number, **more):
        default = OmegaConf.load(ROOT / f"lavis_svp/configs/models/svp_ris_{TYPES[number]}.yaml").model
        own = OmegaConf.load(ROOT / f"projects/svp/train/stage{number}_vicuna7b.yaml").model
        model = OmegaConf.merge(default, own)
        chosen = {key: OmegaConf.to_container(model)[key] for key in CHOICES if key in model}
        chosen["language"]["name"] = str(untied_llama)
        chosen["projector"] |= {"mask_size": 8, "sspe_width": 16}
        return make_model(**{**chosen, **more})

    return build


def idle_after_a_step(model, batch):
    """Names of parameters that train and get no gradient."""
    random.seed(0)
    model(batch)["loss"].backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_all_that_trains_gets_a_gradient_in_both_stages(stage, batch, tmp_path):
    first = stage(1)
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert {"language.output.weight", "language.embed_tokens.weight", "language.added_output"} <= trained
    assert not any(name.startswith(("language.transformer", "projector.sspe", "frozen.")) for name in trained)
    assert idle_after_a_step(first, batch) == []
    save_checkpoint(tmp_path / "checkpoint_1.pth", {"model": first.checkpoint_state()})

    second = stage(2, load_pretrained=True, pretrained=str(tmp_path))
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if name.startswith("language.transformer")}
    assert len(adapters) == 4 and all(".lora_" in name for name in adapters)
    assert "projector.sspe.queries" in trained
    assert idle_after_a_step(second, batch) == []
    for name, tensor in first.checkpoint_state().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_sspe_can_be_there_and_frozen_in_stage_1(stage, batch, tmp_path):
    own = OmegaConf.load(ROOT / "projects/svp/train/stage1_vicuna7b.yaml").model
    patterns = [*own.trainable, "!projector.sspe*"]
    full = {"name": "svp", "sspe": "full", "mask_size": 8, "sspe_width": 16}
    first = stage(1, projector=full, trainable=patterns)
    assert not first.projector.sspe.queries.requires_grad and idle_after_a_step(first, batch) == []
    save_checkpoint(tmp_path / "checkpoint_1.pth", {"model": first.checkpoint_state()})
    second = stage(2, load_pretrained=True, pretrained=str(tmp_path))
    assert torch.equal(second.projector.sspe.queries, first.projector.sspe.queries)  # the same random one


@pytest.mark.parametrize("number", TYPES)
def test_stage_yamls_say_what_the_launcher_knows(number):
    project = read_project(ROOT / f"projects/svp/train/stage{number}_vicuna7b.yaml")
    assert project.run.deepspeed_config["zero_optimization"]["stage"] == 2
    assert project.model.get("load_pretrained", False) == (number == 2) and not project.model.get("pretrained")
