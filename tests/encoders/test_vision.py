import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.encoders.families import FAMILIES
from lavis_svp.encoders.vision import VisionEncoder, build_vision_encoder, checked_extents

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_DINO = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56}
MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL_DINO, patch_size=14)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SMALL_DINO, patch_size=14, num_register_tokens=4)
    ),
    "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=56, patch_size=14)),
    "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=56, patch_size=14)),
}
PREFIX = {"dinov2": 1, "dinov2_with_registers": 5, "clip_vision_model": 1, "siglip_vision_model": 0}


@pytest.fixture(scope="module", params=sorted(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(kind)
    MODELS[kind]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino")
    MODELS["dinov2"]().save_pretrained(path)
    return path


@pytest.mark.parametrize("side", [28, 56, 70])
def test_every_kind_at_every_side(kind, folder, side):
    encoder = build_vision_encoder(folder, side)
    features = encoder(torch.rand(2, 3, 40, 40))
    count = (side // 14) ** 2
    assert encoder.dim == 24 and encoder.patch_size == 14 and encoder.grid == (side // 14, side // 14)
    assert features.patches.shape == (2, count, 24) and features.valid.all()
    assert features.grids == [encoder.grid] * 2


def test_patches_are_the_networks_without_its_prefix(kind, folder):
    encoder = build_vision_encoder(folder, 56, levels=(0, 2, -2))
    pixels = torch.rand(1, 3, 56, 56)
    features = encoder(pixels)
    framed = encoder.frame(pixels, [(56, 56)])
    with torch.no_grad():
        outputs = encoder.network(pixel_values=framed, output_hidden_states=True)
    skip = PREFIX[kind]
    torch.testing.assert_close(features.patches, outputs.last_hidden_state[:, skip:])
    for level, index in enumerate((0, 2, -2)):
        torch.testing.assert_close(features.levels[:, level], outputs.hidden_states[index][:, skip:])
    inner = VisionEncoder(encoder.network, encoder.family, 56, layer=-2)(pixels)
    torch.testing.assert_close(inner.patches, outputs.hidden_states[-2][:, skip:])


def test_it_is_frozen(folder):
    encoder = build_vision_encoder(folder, 56).train()
    assert not encoder.network.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.rand(1, 3, 56, 56)).patches.requires_grad


def test_stretch_shows_the_picture_alone(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56)
    picture = torch.rand(1, 3, 30, 64)
    frame = torch.rand(1, 3, 64, 64)  # what stands in the padding must not matter
    frame[..., :30, :] = picture
    framed, alone = encoder(frame, [(30, 64)]), encoder(picture)
    torch.testing.assert_close(framed.patches, alone.patches)
    assert framed.valid.all()
    assert encoder.picture_shares(frame, [(30, 64)]) == [(1.0, 1.0)]


def test_pad_keeps_the_aspect_ratio(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56, fit="pad")
    frame = torch.rand(2, 3, 64, 64)
    extents = [(33, 64), (64, 16)]
    features = encoder(frame, extents)
    rows = torch.tensor([True, True, True, False])  # 33 of 64 rows reach into the third of four patch rows
    assert torch.equal(features.valid[0].view(4, 4), rows[:, None].expand(4, 4))
    columns = torch.tensor([True, False, False, False])
    assert torch.equal(features.valid[1].view(4, 4), columns[None, :].expand(4, 4))
    assert encoder.picture_shares(frame, extents) == [(33 / 64, 1.0), (1.0, 0.25)]
    changed = frame.clone()
    changed[0, :, 33:] = 0.3
    torch.testing.assert_close(encoder(changed, extents).patches, features.patches)
    assert not encoder.frame(frame, extents)[1, :, :, 20:].any()  # padding is the mean colour


def test_pad_of_a_frame_that_is_not_square(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56, fit="pad")
    features = encoder(torch.rand(1, 3, 28, 56))
    assert torch.equal(features.valid.view(4, 4).any(1), torch.tensor([True, True, False, False]))


def test_normalisation_is_the_familys(kind, folder):
    encoder = build_vision_encoder(folder, 56)
    family = FAMILIES[kind]
    colour = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    framed = encoder.frame(colour.expand(1, 3, 40, 40), [(40, 40)])
    expected = [(c - m) / s for c, m, s in zip((0.2, 0.5, 0.9), family.mean, family.std, strict=True)]
    torch.testing.assert_close(framed[0, :, 7, 7], torch.tensor(expected))


def test_a_batch_equals_its_pictures(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56)
    pixels, extents = torch.rand(3, 3, 48, 48), [(48, 20), (10, 48), (1, 1)]
    together = encoder(pixels, extents).patches
    alone = torch.cat([encoder(pixels[i : i + 1], [extents[i]]).patches for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [0, 13, 225])
def test_a_side_that_the_patch_does_not_divide_is_told(dino_folder, side):
    with pytest.raises(ValueError, match=f"side {side} is not a multiple of its patch size 14. The nearest are"):
        build_vision_encoder(dino_folder, side)


@pytest.mark.parametrize("options", [{"layer": 4}, {"layer": -5}, {"levels": (0, 9)}])
def test_a_layer_that_does_not_exist_is_told(dino_folder, options):
    with pytest.raises(ValueError, match="has 3 layers"):
        build_vision_encoder(dino_folder, 56, **options)


def test_an_unknown_fit_is_told(dino_folder):
    with pytest.raises(ValueError, match="stretch, pad"):
        build_vision_encoder(dino_folder, 56, fit="crop")


@pytest.mark.parametrize("extents", [[(10, 10)], [(0, 5), (5, 5)], [(5, 5), (5, 41)], [(0.5, 1.0), (1.0, 1.0)]])
def test_extents_that_do_not_fit_are_told(extents):
    with pytest.raises(ValueError, match="valid extent"):
        checked_extents(torch.zeros(2, 3, 40, 40), extents)


def test_a_kind_that_is_not_supported_is_told(tmp_path):
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    with pytest.raises(UnknownNameError, match="dinov2"):
        build_vision_encoder(tmp_path)


def test_the_embedded_dinov2(weights):
    encoder = build_vision_encoder(weights("dinov2_small_imgfocus"), 224)
    assert (encoder.dim, encoder.patch_size, encoder.grid) == (384, 14, (16, 16))
    features = encoder(torch.rand(1, 3, 336, 336), [(200, 336)])
    assert features.patches.shape == (1, 256, 384) and features.patches.isfinite().all()
