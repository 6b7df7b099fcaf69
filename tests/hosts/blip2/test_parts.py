"""Vision encoders and language models as parts."""

from __future__ import annotations

import pytest
import torch
from PIL import Image


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
    assert torch.equal(features.patches, states[:, 1:]) and torch.equal(features.summary, states[:, 0])
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
    from lavis_svp.projectors.registry import PROJECTORS

    wanting = [n for n in list_projectors() if PROJECTORS.get(n).requires & {"levels", "keys", "cls_attention"}]
    for name in wanting:
        with pytest.raises(ValueError, match="dinov2_small_imgfocus|levels"):
            make("opt", projector={"name": name})


def test_a_stub_projector_that_needs_attention_is_refused(make, monkeypatch):
    from lavis_svp.projectors.registry import PROJECTORS

    monkeypatch.setattr(PROJECTORS.get("mlp"), "requires", frozenset({"cls_attention"}))
    with pytest.raises(ValueError, match="needs cls_attention, which LAVIS's vision encoders do not give"):
        make("opt", projector={"name": "mlp"})
