"""What only LLaVA has: its own head, levels of its tower, the part of an image that its crop shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor

from lavis_svp.hosts import swap_projector
from lavis_svp.superpixels import RegionMap


@torch.no_grad()
def test_region_maps_from_the_caller_and_the_head_of_the_host(llava, image):
    model, processor = swap_projector(*llava, "mask_pool", superpixels="felzenszwalb")
    halves = RegionMap.from_labels(np.repeat([[0, 1]], 2, axis=0).repeat(30, 0).repeat(30, 1))
    inputs = processor(text="<image>?", images=image(1, 60, 60), region_maps=[halves], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2
    tower = llava[0].model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    patches = tower.hidden_states[-2][0, 1:].view(6, 6, -1)
    means = torch.stack([patches[:, :3].mean((0, 1)), patches[:, 3:].mean((0, 1))])
    wanted = llava[0].model.multi_modal_projector(means)
    visual = model.model.visual_tokens(**{k: v for k, v in inputs.items() if k.startswith(("pixel", "superpixel"))})
    assert torch.allclose(visual.tokens[0], wanted, atol=1e-5)


@torch.no_grad()
def test_levels_of_the_hosts_own_tower(llava, image):
    options = {"scale": 2, "num_levels": 2, "superpixels": "grid"}
    model, processor = swap_projector(*llava, "token_packer", levels=[1, -1], **options)
    inputs = processor(text="<image>?", images=image(1), return_tensors="pt")
    assert model.eval()(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"pass levels=\[...\]"):
        swap_projector(*llava, "token_packer", **options)


def test_counts_that_depend_on_the_features_are_refused(llava, image):
    _, processor = swap_projector(*llava, "dpc_knn", kind="threshold")
    with pytest.raises(ValueError, match="'dpc_knn'.*only after the vision tower has run"):
        processor(text="<image>?", images=image(1), return_tensors="pt")


@pytest.mark.parametrize("side", [48, 52])  # whole patches of 8 pixels, and an edge that no patch sees
def test_patches_and_superpixels_show_the_same(llava, side):
    _, processor = swap_projector(*llava, "mask_pool", superpixels="felzenszwalb")
    crop = {"height": side, "width": side}
    processor.image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)
    red = np.full((side, 2 * side, 3), 255, np.uint8)
    left = side // 2  # where the centre crop begins
    red[16:32, left + 8 : left + 24] = (255, 0, 0)
    inputs = processor(text="<image>?", images=red, return_tensors="pt")
    pixels = inputs["pixel_values"][0, :, :48, :48]
    is_red = (pixels[0] - pixels[1] > 1).float()
    painted = is_red.unflatten(0, (6, 8)).unflatten(2, (6, 8)).mean((1, 3)).flatten()  # (N,)
    nearest = (inputs["superpixel_weights"][0] - painted).abs().sum(1).min()
    assert painted.sum() == 4 and nearest < 0.5
