"""Qwen2-VL as a host: what differs from Qwen2.5-VL, the tower without windows and the merger's LayerNorm."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lavis_svp.hosts import swap_projector
from lavis_svp.hosts.qwen2_vl import SvpQwen2VLForConditionalGeneration

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = [f"What is {IMAGE} this?", f"{IMAGE} and {IMAGE}: which is it?"]


@pytest.fixture
def images(image):
    return [image(0, 40, 90), image(1, 90, 60), image(2, 70, 75)]


def inputs_of(processor, images, side="left"):
    return processor(text=PROMPTS, images=images, padding=True, padding_side=side, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_patch_merger_with_layer_norm_is_the_original_bit_for_bit(qwen2, images, side):
    model, processor = swap_projector(*qwen2, "patch_merger", norm="layer")
    before, after = inputs_of(qwen2[1], images, side), inputs_of(processor, images, side)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    wanted, made = qwen2[0](**before), model(**after)
    assert torch.equal(wanted.logits, made.logits) and torch.equal(wanted.rope_deltas, made.rope_deltas)
    if side == "left":
        for settings in ({"num_beams": 1}, {"num_beams": 3}):
            said = [
                m.generate(**i, max_new_tokens=6, do_sample=False, **settings)
                for m, i in ((qwen2[0], before), (model, after))
            ]
            assert torch.equal(*said)


@torch.no_grad()
@pytest.mark.parametrize("name", ["svp", "vision_zip"])
def test_ragged_batches_cache_and_files(qwen2, images, name, tmp_path):
    small = {"sspe_width": 32, "mask_size": 8} if name == "svp" else {}
    model, processor = swap_projector(*qwen2, name, superpixels="felzenszwalb", **small)
    inputs = inputs_of(processor, images)
    logits = model(**inputs).logits
    for row, (prompt, own) in enumerate(zip(PROMPTS, (images[:1], images[1:]), strict=True)):
        single = processor(text=prompt, images=own, return_tensors="pt")
        assert torch.allclose(logits[row][inputs["attention_mask"][row].bool()], model(**single).logits[0], atol=1e-4)
    said = [model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, SvpQwen2VLForConditionalGeneration)
    reloaded = inputs_of(AutoProcessor.from_pretrained(tmp_path, use_fast=False), images)
    assert torch.equal(logits, again.eval()(**reloaded).logits)
