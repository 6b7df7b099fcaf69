"""Vision encoders in the forms they are published in, fed the colours that they were trained with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModel, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from lavis_svp.vision.backbone import build_vision_encoder
from lavis_svp.vision.families import FAMILIES, with_published_colors

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def dinov2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14)).eval()


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_without_a_file_the_familys(kind, tmp_path):
    assert with_published_colors(FAMILIES[kind], tmp_path) is FAMILIES[kind]


def test_openclips_folder_says_its_own(tmp_path, vision_folders):
    """As laion/CLIP-ViT-L-14-laion2B-s32B-b82K, which was trained with half the range, not with CLIP's colours."""
    folder = shutil.copytree(vision_folders["clip"], tmp_path / "openclip")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    encoder = build_vision_encoder(folder, 56)
    framed = encoder.preprocess(torch.full((1, 3, 56, 56), 0.75), [(56, 56)])
    torch.testing.assert_close(framed, torch.ones_like(framed))


def test_a_file_may_name_one_alone(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    family = with_published_colors(FAMILIES["clip"], tmp_path)
    assert family.mean == (0.1, 0.2, 0.3) and family.std == FAMILIES["clip"].std


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"image_mean": 0.5}',
        '{"image_std": [0.5, 0.5]}',
        '{"image_mean": ["a"]}',
        "[" * 100_000,
        '{"image_mean": [NaN, 0, 0]}',
        '{"image_std": [0.5, 0, 0.5]}',
        '{"image_std": [Infinity, 1, 1]}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        with_published_colors(FAMILIES["clip"], tmp_path)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_dinov2_folder_is_read_in_every_form(tmp_path, dinov2, safe, size):
    dinov2.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=size)
    encoder = build_vision_encoder(tmp_path, 56)
    stored = dinov2.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder.network.state_dict().items())


@pytest.mark.parametrize("safe", [True, False])
def test_of_a_whole_clip_folder_the_vision_tower_is_taken(tmp_path, safe):
    """openai/clip-vit-large-patch14-336 holds both towers, in pytorch_model.bin."""
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 56, "patch_size": 14}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    clip.save_pretrained(tmp_path, safe_serialization=safe)
    encoder = build_vision_encoder(tmp_path, 56, layer=-2)
    stored = clip.vision_model.state_dict()
    assert all(torch.equal(t, stored[n]) for n, t in encoder.network.vision_model.state_dict().items())
    features = encoder(torch.rand(1, 3, 56, 56))
    assert features.patches.shape == (1, 16, 24)
    bare = build_vision_encoder(tmp_path, 56, layer=-2, weights="none")
    assert {n: t.shape for n, t in bare.state_dict().items()} == {n: t.shape for n, t in encoder.state_dict().items()}
    assert all(parameter.is_meta for parameter in bare.parameters())


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dual", ["clip", "siglip", "siglip2"])
def test_of_every_model_of_images_and_text_the_vision_tower_is_taken(tmp_path, vision_folders, dual, safe):
    whole = AutoModel.from_pretrained(vision_folders[dual])
    whole.save_pretrained(tmp_path, safe_serialization=safe)
    stored, loaded = whole.vision_model.state_dict(), build_vision_encoder(tmp_path, 56).network.vision_model
    assert stored.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())


def test_every_family_without_weights(folder):
    real, bare = build_vision_encoder(folder, 56), build_vision_encoder(folder, 56, weights="none")
    shapes = [{n: t.shape for n, t in encoder.named_parameters()} for encoder in (real, bare)]
    assert shapes[0] == shapes[1] and all(parameter.is_meta for parameter in bare.parameters())
