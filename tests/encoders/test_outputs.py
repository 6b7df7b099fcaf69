"""What an encoder gives besides patches, against the real classes run in their slow form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from lavis_svp.encoders.families import cut_patches, family_of
from lavis_svp.encoders.outputs import check_outputs, encode_patches

PATCH, LAYERS = 14, 3
ALL = ("cls_attention", "keys", "summary")


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
        features = encode_patches(network, family, pixels, valid, layer, wants=ALL)
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


def test_the_summary_is_cls_or_the_mean_of_what_shows_the_image(folder, images):
    pixels, valid = images
    network, family = network_of(folder)
    with torch.no_grad():
        summary = encode_patches(network, family, pixels, valid, layer=1, wants=["summary"]).summary
    outputs, _ = slow_outputs(folder, pixels, valid)
    for row in range(2):
        if family.prefix_tokens(network.config):
            expected = outputs.pooler_output[row]
        else:
            expected = outputs.last_hidden_state[row][valid[row]].mean(0)
        torch.testing.assert_close(summary[row], expected, atol=1e-5, rtol=1e-4)


def test_a_towers_gradients_flow(folder, images):
    """A host may train its tower: nothing is frozen here."""
    network, family = network_of(folder)
    features = encode_patches(network.train(), family, *images, layer=-2, levels=(2,), wants=(*ALL, "levels"))
    assert network.training
    for name in ("patches", "levels", "cls_attention", "keys", "summary"):
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
        full = encode_patches(network, family, pixels, valid, layer=-2, wants=ALL)
        half = encode_patches(network.bfloat16(), family, pixels.bfloat16(), valid, layer=-2, wants=ALL)
    for name in ("patches", *ALL):
        assert getattr(half, name).dtype == torch.bfloat16
    torch.testing.assert_close(half.cls_attention.float(), full.cls_attention, atol=0.03, rtol=0.1)


def test_patches_are_cut_as_naflexs_own_processor_does():
    pixels = torch.randn(2, 3, 28, 42)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    given = cut_patches(pixels, valid, PATCH)
    for row, image in enumerate(pixels):
        expected = convert_image_to_patches(image.permute(1, 2, 0).numpy(), PATCH)
        assert np.array_equal(given["pixel_values"][row].numpy(), expected)
    assert given["pixel_attention_mask"].tolist() == valid.long().tolist()
    assert given["spatial_shapes"].tolist() == [[2, 3]] * 2


@pytest.mark.parametrize(
    ("layer", "levels", "wants", "told"),
    [
        (4, (), (), "Layer 4 does not exist: the encoder has 3 layers"),
        (-1, (-5,), (), "Layer -5 does not exist"),
        (-1, (), ("levels",), r"set model.vision_encoder.levels, for example \[0, 1, 2, 3\]"),
        (0, (), ("keys", "cls_attention"), "Layer 0 is the embedding.*cls_attention and keys are wanted"),
        (-4, (), ("keys",), "Layer -4 is the embedding"),
        (-1, (), ("key",), "did you mean 'keys'"),
    ],
)
def test_what_an_encoder_cannot_give_is_told(layer, levels, wants, told):
    with pytest.raises(ValueError, match=told):
        check_outputs(LAYERS, layer, levels, wants)


def test_what_does_not_fill_a_patch_is_not_seen(folder, images):
    network, family = network_of(folder)
    pixels, valid = images
    larger = torch.nn.functional.pad(pixels, (0, 13, 0, 5), value=9.0)
    with torch.no_grad():
        whole, edged = (encode_patches(network, family, p, valid, wants=ALL) for p in (pixels, larger))
    assert edged.grids == whole.grids == [(3, 4)] * 2
    for name in ("patches", *ALL):
        torch.testing.assert_close(getattr(edged, name), getattr(whole, name))


def test_validity_of_another_grid_is_told(vision_folders):
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
        features = encode_patches(tower, family_of(tower.config), pixels, valid, layer=-2, wants=ALL)
    assert features.patches.shape == (1, 768, width) and features.keys.shape == (1, 768, width // 16)
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters


def test_in_shape_alone(kind, folder, images):
    network, family = network_of(folder)
    pixels, valid = (tensor.to("meta") for tensor in images)
    if kind == "dinov3_vit":
        with pytest.raises(NotImplementedError, match="DINOv3ViTModel on no meta device"):
            encode_patches(network.to("meta"), family, pixels, valid)
        return
    features = encode_patches(network.to("meta"), family, pixels, valid, wants=ALL)
    assert features.cls_attention.shape == (2, 12) and features.summary.shape == (2, 24)
