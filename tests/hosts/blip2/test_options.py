"""The ``model:`` section, and the default configurations."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vit_modell": "clip_L"}, "did you mean 'vit_model'"),
        ({"lm_precision": "half"}, "model.lm_precision must be one of fp32, bf16, fp16, got 'half'"),
        ({"projector": {"sspe_width": 16}}, "model.projector needs a name"),
        ({"max_txt_len": 0}, "at least 1, got 0"),
        ({"vit_model": "dinov2_small_imgfocus", "freeze_vit": False}, "always frozen"),
        ({"levels": [1, 2]}, "gives its last layer only"),
    ],
)
def test_what_cannot_be_is_refused(section, message):
    from lavis_svp.hosts.blip2.options import Blip2OPTOptions, read_blip2_options

    with pytest.raises(ValueError, match=message):
        read_blip2_options(Blip2OPTOptions, OmegaConf.create(section))


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_default_configurations_are_laviss_own_with_another_projector(kind):
    """Every key that LAVIS's file has, too, has LAVIS's value; every file is read whole."""
    from lavis.common.registry import registry

    import lavis_svp  # noqa: F401
    from lavis_svp.hosts.blip2.options import Blip2OPTOptions, Blip2T5Options, read_blip2_options

    ours, theirs = registry.get_model_class(f"blip2_{kind}_svp"), registry.get_model_class(f"blip2_{kind}")
    options_class = Blip2OPTOptions if kind == "opt" else Blip2T5Options
    for model_type in ours.PRETRAINED_MODEL_CONFIG_DICT:
        own = OmegaConf.load(ours.default_config_path(model_type))
        stock = OmegaConf.load(theirs.default_config_path(model_type))
        assert own.preprocess == stock.preprocess
        assert own.model.arch == f"blip2_{kind}_svp"  # LAVIS's files name a wrong one
        shared = {key for key in stock.model if key in own.model} - {"arch"}
        assert {key: own.model[key] for key in shared} == {key: stock.model[key] for key in shared}
        assert set(stock.model) - shared == {"arch", "num_query_token"}
        options = read_blip2_options(options_class, own.model)
        assert options.projector["name"] == "svp" and options.lm_precision == ("fp16" if kind == "opt" else "bf16")


def test_the_zoo_lists_them():
    from lavis.models import model_zoo

    import lavis_svp  # noqa: F401

    assert "pretrain_opt2.7b" in model_zoo.model_zoo["blip2_opt_svp"]
    assert "pretrain_flant5xl" in model_zoo.model_zoo["blip2_t5_svp"]
