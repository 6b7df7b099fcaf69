"""The ``model:`` section, and the default configurations."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image


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
    from lavis_svp.hosts.blip2.parts import Blip2OPTOptions, read_blip2_options

    with pytest.raises(ValueError, match=message):
        read_blip2_options(Blip2OPTOptions, OmegaConf.create(section))


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_default_configurations_are_laviss_own_with_another_projector(kind):
    """Every key that LAVIS's file has, too, has LAVIS's value; every file is read whole."""
    from lavis.common.registry import registry

    import lavis_svp  # noqa: F401
    from lavis_svp.hosts.blip2.parts import Blip2OPTOptions, Blip2T5Options, read_blip2_options

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


def test_the_grid_of_each_encoder(tiny_vit):
    from lavis.models.blip2_models import blip2
    from lavis.models.clip_vit import VisionTransformer

    from lavis_svp.hosts.blip2.parts import vision_dim, vision_grid

    eva = blip2.create_eva_vit_g()
    assert (vision_grid(eva), vision_dim(eva)) == ((4, 4), 24)
    clip = VisionTransformer(56, 14, 32, 2, 2, use_grad_checkpointing=False)
    assert (vision_grid(clip), vision_dim(clip)) == ((4, 4), 32)
    assert clip(torch.zeros(1, 3, 56, 56)).shape == (1, 17, 32)


def test_patches_and_superpixels_show_the_same_pixels(make, samples):
    """An input that only one patch sees moves that patch's token more than any other."""
    model = make("opt", projector={"name": "mlp"})
    assert torch.allclose(model.pixels(samples["image"])[0], torch.full((3, 56, 56), 0.2), atol=1e-6)
    with torch.no_grad():
        features = model.patch_features(samples["image"])
        states = model.ln_vision(model.visual_encoder(samples["image"]))
    assert torch.equal(features.patches, states[:, 1:])
    assert features.grids == [(4, 4)] * 3


def test_an_encoder_of_ours_with_embedded_weights(make, weights):
    """DINOv2-small sees the un-normalised image, resized to itself."""
    from lavis.processors.blip_processors import BlipImageEvalProcessor

    weights("dinov2_small_imgfocus")
    model = make("opt", vit_model="dinov2_small_imgfocus")
    photo = Image.new("RGB", (90, 60), (200, 30, 30))
    image = BlipImageEvalProcessor(image_size=56)(photo)[None]
    features = model.patch_features(image)
    expected = model.visual_encoder(torch.tensor([200, 30, 30]).view(1, 3, 1, 1).expand(1, 3, 56, 56) / 255)
    assert torch.allclose(features.patches, expected.patches, atol=1e-4)
    assert len(model.generate({"image": image}, num_beams=2, max_length=4)) == 1
    assert not [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("opt_proj.")]


def test_a_projector_that_needs_more_than_laviss_encoders_give(make):
    from lavis_svp.projectors import list_projectors
    from lavis_svp.projectors.base import PROJECTORS

    wanting = [n for n in list_projectors() if PROJECTORS.get(n).requires & {"levels", "keys", "cls_attention"}]
    for name in wanting:
        with pytest.raises(ValueError, match="dinov2_small_imgfocus|levels"):
            make("opt", projector={"name": name})


def test_a_stub_projector_that_needs_attention_is_refused(make, monkeypatch):
    from lavis_svp.projectors.base import PROJECTORS

    monkeypatch.setattr(PROJECTORS.get("mlp"), "requires", frozenset({"cls_attention"}))
    with pytest.raises(ValueError, match="needs cls_attention, which LAVIS's vision encoders do not give"):
        make("opt", projector={"name": "mlp"})
