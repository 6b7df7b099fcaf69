"""After ``import lavis_svp`` LAVIS knows this plugin's names and those that are registered later."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

import lavis_svp  # noqa: F401  (before LAVIS)

from lavis.common.registry import registry  # isort: skip
from lavis.datasets.builders import dataset_zoo, load_dataset
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.models import load_model, load_model_and_preprocess, model_zoo
from lavis.models.base_model import BaseModel
from lavis.processors import load_processor
from torch import nn


@pytest.fixture
def dummy(tmp_path):
    """A model registered after LAVIS's import, as a user's own file would."""
    path = tmp_path / "dummy.yaml"
    OmegaConf.save({"model": {"arch": "dummy", "width": 3}, "preprocess": {}}, path)

    @registry.register_model("dummy")
    class Dummy(BaseModel):
        PRETRAINED_MODEL_CONFIG_DICT = {"tiny": str(path)}

        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, width)

        @classmethod
        def from_config(cls, cfg):
            return cls(cfg.get("width", 1))

    yield Dummy
    del registry.mapping["model_name_mapping"]["dummy"]


def test_lavis_loads_a_model_registered_later_and_its_zoo_shows_it(dummy):
    before = len(model_zoo)
    model, vis, txt = load_model_and_preprocess("dummy", "tiny", is_eval=True)
    assert model.linear.in_features == 3 and set(vis) == set(txt) == {"train", "eval"}
    assert "dummy" in str(model_zoo) and ("dummy", ["tiny"]) in list(model_zoo)
    assert before > 50


@pytest.mark.parametrize("kind", ["runners", "lr_schedulers", "models", "tasks", "processors", "datasets"])
def test_lavis_own_names_are_registered_too(kind):
    own = {
        "runners": "runner_iter",
        "lr_schedulers": "linear_warmup_cosine_lr",
        "models": "blip2",
        "tasks": "captioning",
        "processors": "blip_caption",
        "datasets": "coco_caption",
    }
    assert own[kind] in getattr(registry, f"list_{kind}")()


def test_this_plugin_is_registered():
    assert "runner_svp" in registry.list_runners()


@pytest.mark.parametrize(
    ("ask", "listed"),
    [
        (lambda: load_model("blip3", "base"), "blip2"),
        (lambda: load_model_and_preprocess("blip3", "base"), "blip2"),
        (lambda: load_dataset("coco_captions"), "coco_caption"),
        (lambda: load_processor("blip_captions"), "blip_caption"),
        (lambda: registry.get_task_class("captionin"), "captioning"),
        (lambda: registry.get_runner_class("runner_iters"), "runner_iter"),
        (lambda: registry.get_lr_scheduler_class("cosin"), "linear_warmup_cosine_lr"),
        (lambda: load_model("blip_vqa", "large"), "vqav2"),
        (lambda: BaseDatasetBuilder.__subclasses__()[0].default_config_path("nope"), "default"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(ask, listed):
    with pytest.raises(KeyError, match=listed):
        ask()


def test_the_data_zoo_shows_names_registered_later():
    registry.mapping["builder_name_mapping"]["later"] = type("Later", (), {"DATASET_CONFIG_DICT": {"default": ""}})
    try:
        assert "later" in dataset_zoo.get_names()
    finally:
        del registry.mapping["builder_name_mapping"]["later"]
