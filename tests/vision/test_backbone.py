from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.projectors.types import Superpixels
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.backbone import (
    FrozenModule,
    VisionEncoder,
    build_vision_encoder,
    check_outputs,
    checked_image_sizes,
    encode_patches,
)
from lavis_svp.vision.families import FAMILIES, family_of, naflex_inputs

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PREFIX = {"dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 3, "clip": 1, "clip_vision_model": 1}  # others none
GIVEN = ["cls_attention", "keys", "levels"]


@pytest.fixture
def dino_folder(vision_folders):
    return vision_folders["dinov2"]


def test_every_family_has_its_tests(vision_folders):
    assert set(vision_folders) == set(FAMILIES)


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
    framed = encoder.preprocess(pixels, [(56, 56)])
    inputs = encoder.family.inputs(framed, features.valid, 14)
    with torch.no_grad():
        outputs = encoder.network(**inputs, output_hidden_states=True)
    skip = PREFIX.get(kind, 0)
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


def test_stretch_shows_the_image_alone(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56)
    image = torch.rand(1, 3, 30, 64)
    frame = torch.rand(1, 3, 64, 64)  # what stands in the padding must not matter
    frame[..., :30, :] = image
    framed, alone = encoder(frame, [(30, 64)]), encoder(image)
    torch.testing.assert_close(framed.patches, alone.patches)
    assert framed.valid.all()
    assert encoder.image_shares(frame, [(30, 64)]) == [(1.0, 1.0)]


def test_pad_keeps_the_aspect_ratio(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56, fit="pad")
    frame = torch.rand(2, 3, 64, 64)
    extents = [(33, 64), (64, 16)]
    features = encoder(frame, extents)
    rows = torch.tensor([True, True, True, False])  # 33 of 64 rows reach into the third of four patch rows
    assert torch.equal(features.valid[0].view(4, 4), rows[:, None].expand(4, 4))
    columns = torch.tensor([True, False, False, False])
    assert torch.equal(features.valid[1].view(4, 4), columns[None, :].expand(4, 4))
    assert encoder.image_shares(frame, extents) == [(33 / 64, 1.0), (1.0, 0.25)]
    changed = frame.clone()
    changed[0, :, 33:] = 0.3
    torch.testing.assert_close(encoder(changed, extents).patches, features.patches)
    assert not encoder.preprocess(frame, extents)[1, :, :, 20:].any()  # padding is the mean colour


def test_pad_of_a_frame_that_is_not_square(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56, fit="pad")
    features = encoder(torch.rand(1, 3, 28, 56))
    assert torch.equal(features.valid.view(4, 4).any(1), torch.tensor([True, True, False, False]))


def test_normalisation_is_the_familys(kind, folder):
    encoder = build_vision_encoder(folder, 56)
    family = FAMILIES[kind]
    colour = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    framed = encoder.preprocess(colour.expand(1, 3, 40, 40), [(40, 40)])
    expected = [(c - m) / s for c, m, s in zip((0.2, 0.5, 0.9), family.mean, family.std, strict=True)]
    torch.testing.assert_close(framed[0, :, 7, 7], torch.tensor(expected))


def test_a_batch_equals_its_images(dino_folder):
    encoder = build_vision_encoder(dino_folder, 56)
    pixels, extents = torch.rand(3, 3, 48, 48), [(48, 20), (10, 48), (1, 1)]
    together = encoder(pixels, extents).patches
    alone = torch.cat([encoder(pixels[i : i + 1], [extents[i]]).patches for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [0, 13, 225])
def test_a_side_that_the_patch_does_not_divide_is_refused(dino_folder, side):
    with pytest.raises(ValueError, match=f"side {side} is not a multiple of its patch size 14. The nearest are"):
        build_vision_encoder(dino_folder, side)


@pytest.mark.parametrize("options", [{"layer": 4}, {"layer": -5}, {"levels": (0, 9)}])
def test_a_layer_that_does_not_exist_is_refused(dino_folder, options):
    with pytest.raises(ValueError, match="has 3 layers"):
        build_vision_encoder(dino_folder, 56, **options)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_patches_see_what_the_superpixels_see(kind, folder, fit, corner):
    """A superpixel painted in a corner of the image pools the patches of that corner, and these alone change."""
    size = (56, 56) if fit == "stretch" else (56, 28)  # padded on the right to 56 x 56
    encoder = build_vision_encoder(folder, 56, fit, layer=0)
    top, left = (edge * side // 2 for edge, side in zip(corner, size, strict=True))
    painted = (slice(top, top + size[0] // 2), slice(left, left + size[1] // 2))
    before = torch.full((1, 3, 56, 56), 0.5)
    after = before.clone()
    after[:, :, *painted] = 0.9
    labels = np.zeros(size, np.int32)
    labels[painted] = 1
    region_map = RegionMap.from_labels(labels)
    shares = encoder.image_shares(before, [size])
    superpixels = Superpixels.from_region_maps([region_map], [encoder.grid], shares, mask_size=None)
    share = superpixels.weights[0, region_map.labels[top, left]]
    changed = (encoder(after, [size]).patches - encoder(before, [size]).patches).abs().amax(-1)[0]
    torch.testing.assert_close(share, share.round())
    assert round(float(share.sum())) == (4 if fit == "stretch" else 2)
    assert torch.equal(changed > 1e-4, share > 0)


@pytest.mark.parametrize("side", [[28, 70], (70, 28), [56, 56]])
def test_an_input_that_is_not_square(kind, folder, side):
    encoder = build_vision_encoder(folder, side, outputs=("cls_attention", "keys"))
    features = encoder(torch.rand(2, 3, 40, 40), [(40, 30), (9, 40)])
    assert encoder.grid == (side[0] // 14, side[1] // 14) and features.grids == [encoder.grid] * 2
    assert features.patches.shape == (2, encoder.grid[0] * encoder.grid[1], 24) and features.valid.all()
    assert encoder.image_shares(torch.rand(1, 3, 40, 40)) == [(1.0, 1.0)]


@pytest.mark.parametrize(
    ("side", "fit", "message"),
    [
        ([28, 30], "stretch", "side 30 is not a multiple of its patch size 14. The nearest are 28 and 42"),
        ([28], "stretch", "number of pixels or"),
        (["a", 28], "stretch", "number of pixels or"),
        ([28, 56], "pad", "fit: pad needs a square input"),
    ],
)
def test_sides_that_do_not_fit_are_refused(dino_folder, side, fit, message):
    with pytest.raises(ValueError, match=message):
        build_vision_encoder(dino_folder, side, fit)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_everything_asked_for_is_given_and_belongs_to_the_image_alone(folder, fit, layer):
    encoder = build_vision_encoder(folder, 56, fit, layer, levels=(1, 3, -1), outputs=GIVEN)
    pixels, extents = torch.rand(3, 3, 48, 48), [(48, 20), (10, 48), (48, 48)]
    together = encoder(pixels, extents)
    assert together.levels.shape == (3, 3, 16, 24) and together.keys.shape == (3, 16, 12)
    assert together.cls_attention.shape == (3, 16)
    assert not together.cls_attention[~together.valid].any() and (together.cls_attention[together.valid] > 0).all()
    for index, extent in enumerate(extents):
        alone = encoder(pixels[index : index + 1], [extent])
        for name in ("patches", *GIVEN):
            torch.testing.assert_close(getattr(together, name)[index], getattr(alone, name)[0], atol=1e-5, rtol=1e-4)


def test_nothing_is_given_unasked(folder):
    features = build_vision_encoder(folder, 28)(torch.rand(1, 3, 30, 30))
    assert all(getattr(features, name) is None for name in GIVEN)


def test_an_unknown_fit_is_refused(dino_folder):
    with pytest.raises(ValueError, match="stretch, pad"):
        build_vision_encoder(dino_folder, 56, fit="crop")


@pytest.mark.parametrize("extents", [[(10, 10)], [(0, 5), (5, 5)], [(5, 5), (5, 41)], [(0.5, 1.0), (1.0, 1.0)]])
def test_extents_that_do_not_fit_are_refused(extents):
    with pytest.raises(ValueError, match="image size"):
        checked_image_sizes(torch.zeros(2, 3, 40, 40), extents)


def test_a_kind_that_is_not_supported_is_refused(tmp_path):
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    with pytest.raises(UnknownNameError, match="dinov2"):
        build_vision_encoder(tmp_path)


def test_the_embedded_dinov2(weights):
    encoder = build_vision_encoder(weights("dinov2_small_imgfocus"), 224)
    assert (encoder.dim, encoder.patch_size, encoder.grid) == (384, 14, (16, 16))
    features = encoder(torch.rand(1, 3, 336, 336), [(200, 336)])
    assert features.patches.shape == (1, 256, 384) and features.patches.isfinite().all()


def test_the_embedded_dinov2_gives_all(weights):
    encoder = build_vision_encoder(
        weights("dinov2_small_imgfocus"), [224, 336], layer=-2, levels=(4, 8, -1), outputs=GIVEN
    )
    features = encoder(torch.rand(2, 3, 240, 240))
    assert features.grids == [(16, 24)] * 2 and features.levels.shape == (2, 3, 384, 384)
    assert features.keys.shape == (2, 384, 64)
    attention = features.cls_attention
    assert attention.isfinite().all() and (attention > 0).all() and (attention.sum(1) < 1).all()
    last = build_vision_encoder(weights("dinov2_small_imgfocus"), [224, 336])(torch.rand(1, 3, 240, 240)).patches
    assert last.shape == features.levels[:1, -1].shape


PATCH, LAYERS = 14, 3
ALL = ("cls_attention", "keys")


def network_of(folder, implementation="sdpa"):
    family = family_of(AutoConfig.from_pretrained(folder))
    return family.model.from_pretrained(folder, attn_implementation=implementation), family


def slow_outputs(folder, pixels, valid):
    """Attentions and keys as the network itself computes them: "eager", with hooks on the key projections."""
    network, family = network_of(folder, "eager")
    inputs = {"pixel_values": pixels}
    if family.masked:
        cut = [convert_image_to_patches(image.permute(1, 2, 0).numpy(), PATCH) for image in pixels]
        shapes = torch.tensor([[pixels.shape[2] // PATCH, pixels.shape[3] // PATCH]] * len(pixels))
        inputs = {"pixel_values": torch.tensor(np.stack(cut)), "pixel_attention_mask": valid, "spatial_shapes": shapes}
    elif hasattr(network, "vision_model"):
        inputs["interpolate_pos_encoding"] = True
    keys = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: keys.append(output))
        for name, module in network.named_modules()
        if name.endswith((".k_proj", ".key"))
    ]
    with torch.no_grad():
        outputs = network(**inputs, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(keys) == len(outputs.attentions) == LAYERS
    return outputs, keys


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[0, :, 2:] = False
    valid[1, 2:] = False
    return torch.randn(2, 3, 3 * PATCH, 4 * PATCH, generator=generator), valid.flatten(1)


@pytest.mark.parametrize("layer", [-1, 3, -2, 1])
def test_attention_and_keys_are_the_networks_own(folder, images, layer):
    pixels, valid = images
    network, family = network_of(folder)
    with torch.no_grad():
        features = encode_patches(network, family, pixels, valid, layer, outputs=ALL)
    outputs, keys = slow_outputs(folder, pixels, valid)
    block = layer % (LAYERS + 1) - 1
    prefix = family.prefix_tokens(network.config)
    weights = outputs.attentions[block].mean(1)  # (B, T, T)
    for row in range(2):
        if prefix:
            expected = weights[row, 0, prefix:]
        else:
            asked = [weights[row, query] for query in range(12) if valid[row, query]]
            expected = torch.stack(asked).mean(0)
        expected = torch.where(valid[row], expected, 0.0)
        torch.testing.assert_close(features.cls_attention[row], expected, atol=1e-6, rtol=1e-4)
    by_head = keys[block][:, prefix:].unflatten(-1, (2, 12))  # (B, N, H, d)
    torch.testing.assert_close(features.keys, by_head.mean(2), atol=1e-5, rtol=1e-4)
    last = outputs.last_hidden_state[:, prefix:]
    torch.testing.assert_close(features.patches, last if layer == -1 else outputs.hidden_states[layer][:, prefix:])


def test_a_towers_gradients_flow(folder, images):
    """A host may train its tower: nothing is frozen here."""
    network, family = network_of(folder)
    features = encode_patches(network.train(), family, *images, layer=-2, levels=(2,), outputs=(*ALL, "levels"))
    assert network.training
    for name in ("patches", "levels", "cls_attention", "keys"):
        assert getattr(features, name).requires_grad, name
    (features.cls_attention.square().sum() + features.keys.sum()).backward()
    assert all(
        parameter.grad is not None
        for name, parameter in network.named_parameters()
        if name.endswith(("patch_embedding.weight", "0.self_attn.q_proj.weight"))
    )


def test_half_precision(folder, images):
    network, family = network_of(folder)
    pixels, valid = images
    with torch.no_grad():
        full = encode_patches(network, family, pixels, valid, layer=-2, outputs=ALL)
        half = encode_patches(network.bfloat16(), family, pixels.bfloat16(), valid, layer=-2, outputs=ALL)
    for name in ("patches", *ALL):
        assert getattr(half, name).dtype == torch.bfloat16
    torch.testing.assert_close(half.cls_attention.float(), full.cls_attention, atol=0.03, rtol=0.1)


def test_patches_are_cut_as_naflexs_own_processor_does():
    pixels = torch.randn(2, 3, 28, 42)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    given = naflex_inputs(pixels, valid, PATCH)
    for row, image in enumerate(pixels):
        expected = convert_image_to_patches(image.permute(1, 2, 0).numpy(), PATCH)
        assert np.array_equal(given["pixel_values"][row].numpy(), expected)
    assert given["pixel_attention_mask"].tolist() == valid.long().tolist()
    assert given["spatial_shapes"].tolist() == [[2, 3]] * 2


@pytest.mark.parametrize(
    ("layer", "levels", "outputs", "message"),
    [
        (4, (), (), "Layer 4 does not exist: the encoder has 3 layers"),
        (-1, (-5,), (), "Layer -5 does not exist"),
        (-1, (), ("levels",), r"set model.vision_encoder.levels, for example \[0, 1, 2, 3\]"),
        (0, (), ("keys", "cls_attention"), "needs cls_attention and keys, but layer 0 is the embedding"),
        (-4, (), ("keys",), "needs keys, but layer -4 is the embedding"),
        (-1, (), ("key",), "did you mean 'keys'"),
    ],
)
def test_what_an_encoder_cannot_give_is_refused(layer, levels, outputs, message):
    with pytest.raises(ValueError, match=message):
        check_outputs(LAYERS, layer, levels, outputs)


def test_what_does_not_fill_a_patch_is_not_seen(folder, images):
    network, family = network_of(folder)
    pixels, valid = images
    larger = torch.nn.functional.pad(pixels, (0, 13, 0, 5), value=9.0)
    with torch.no_grad():
        whole, edged = (encode_patches(network, family, p, valid, outputs=ALL) for p in (pixels, larger))
    assert edged.grids == whole.grids == [(3, 4)] * 2
    for name in ("patches", *ALL):
        torch.testing.assert_close(getattr(edged, name), getattr(whole, name))


def test_validity_of_another_grid_is_refused(vision_folders):
    network, family = network_of(vision_folders["dinov2"])
    with pytest.raises(ValueError, match=r"have 2x2 patches, valid is \(1, 6\)"):
        encode_patches(network, family, torch.zeros(1, 3, 28, 30), torch.ones(1, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("width", "layers", "inner", "parameters"), [(1280, 32, 5120, 630_766_080), (1664, 48, 8192, 1_842_777_344)]
)
def test_openclips_large_towers_in_shape(width, layers, inner, parameters):
    """LAION's ViT-H/14 and ViT-bigG/14: heads of 80 and 104 channels."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 16, "intermediate_size": inner}
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="gelu", image_size=224, patch_size=14)).eval()
        pixels, valid = torch.empty(1, 3, 336, 448), torch.ones(1, 24 * 32, dtype=torch.bool)
        features = encode_patches(tower, family_of(tower.config), pixels, valid, layer=-2, outputs=ALL)
    assert features.patches.shape == (1, 768, width) and features.keys.shape == (1, 768, width // 16)
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters


def test_in_shape_alone(kind, folder, images):
    network, family = network_of(folder)
    pixels, valid = (tensor.to("meta") for tensor in images)
    if kind == "dinov3_vit":
        with pytest.raises(NotImplementedError, match="DINOv3ViTModel on no meta device"):
            encode_patches(network.to("meta"), family, pixels, valid)
        return
    features = encode_patches(network.to("meta"), family, pixels, valid, outputs=ALL)
    assert features.cls_attention.shape == (2, 12)


class Toy(FrozenModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.freeze()


def test_it_stays_frozen_inside_a_model_that_trains():
    model = nn.ModuleDict({"frozen": Toy(), "other": nn.Linear(2, 2)})
    model.train()
    assert model["other"].training
    assert not any(module.training for module in model["frozen"].modules())
    assert not any(parameter.requires_grad for parameter in model["frozen"].parameters())


def test_batch_norm_does_not_drift():
    toy = Toy().train()
    toy.layers(torch.randn(8, 2) + 5)
    assert torch.equal(toy.layers[1].running_mean, torch.zeros(2))


def test_images_of_one_size_are_resized_together(dino_folder, monkeypatch):
    encoder = build_vision_encoder(dino_folder, 56, fit="pad")
    pixels, sizes = torch.rand(4, 3, 64, 64), [(64, 48), (64, 64), (64, 48), (64, 64)]
    alone = torch.cat([encoder.preprocess(pixels[i : i + 1], [size]) for i, size in enumerate(sizes)])
    calls, resize = [], torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *a, **k: calls.append(1) or resize(*a, **k))
    assert torch.equal(encoder.preprocess(pixels, sizes), alone) and len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_read_in_their_dtype(kind, folder, dtype):
    exact, half = build_vision_encoder(folder, 56), build_vision_encoder(folder, 56, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert half.pixel_norm.mean.dtype == torch.float32
    pixels = torch.rand(1, 3, 56, 56)
    expected, found = exact(pixels).patches, half(pixels).patches
    assert found.dtype == torch.float32 and float((found - expected).norm() / expected.norm()) < 0.05


def test_tf32_reaches_no_angle_of_dinov3(vision_folders):
    """It multiplies matrices with reduced precision; these angles are elementwise products."""
    encoder = build_vision_encoder(vision_folders["dinov3_vit"], 56)
    operations = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Recorded():
        encoder.network.get_submodule(encoder.family.names.rotary)(torch.zeros(1, 3, 56, 56))
    assert "cos" in operations and {"mm", "bmm", "matmul", "addmm", "baddbmm"}.isdisjoint(operations)
