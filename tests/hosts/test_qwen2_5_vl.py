"""Qwen2.5-VL with other projectors: the same logits with `patch_merger`, ragged tokens, M-RoPE, generation, files."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from lavis_svp.hosts import swap_projector
from lavis_svp.hosts.mrope import PADDING_POSITION
from lavis_svp.hosts.qwen2_5_vl import SvpQwen2_5_VLForConditionalGeneration
from lavis_svp.hosts.qwen_processor import usual_grid

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = [f"What is {IMAGE} this?", f"{IMAGE} and {IMAGE}: which is it?"]
SIZES = [(40, 90), (90, 60), (70, 75)]
SMALL = {"avg_pool": {"tokens_h": 3, "tokens_w": 2}, "svp": {"sspe_width": 32, "mask_size": 8}}
PROJECTORS = ["svp", "mask_pool", "mlp", "avg_pool", "patch_merger", "vision_zip", "token_packer"]
SETTINGS = {"vision_zip": {}, "token_packer": {}}


def swapped(host, name, **choices):
    levels = {"levels": [1, 2]} if name == "token_packer" else {}
    model, processor = swap_projector(
        *host, name, superpixels="felzenszwalb", **levels, **SMALL.get(name, {}), **choices
    )
    return model.eval(), processor


@pytest.fixture
def pictures(picture):
    return [picture(seed, *size) for seed, size in enumerate(SIZES)]


@pytest.fixture
def inputs_of(pictures):
    def make(processor, side="left"):
        return processor(text=PROMPTS, images=pictures, padding=True, padding_side=side, return_tensors="pt")

    return make


def alone(processor, pictures):
    """Each prompt by itself, with its own pictures."""
    for prompt, own in zip(PROMPTS, (pictures[:1], pictures[1:]), strict=True):
        yield processor(text=prompt, images=own, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_patch_merger_is_the_original_bit_for_bit(qwen, inputs_of, side):
    model, processor = swapped(qwen, "patch_merger")
    before, after = inputs_of(qwen[1], side), inputs_of(processor, side)
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    assert len({tuple(grid) for grid in before["image_grid_thw"].tolist()}) == 3
    wanted, made = qwen[0](**before), model(**after)
    assert torch.equal(wanted.logits, made.logits)
    assert torch.equal(wanted.rope_deltas, made.rope_deltas) and wanted.rope_deltas.ne(0).any()
    if side == "left":
        said = [m.generate(**i, max_new_tokens=6, do_sample=False) for m, i in ((qwen[0], before), (model, after))]
        assert torch.equal(*said)


def test_the_original_is_left_alone(qwen):
    state = {key: value.clone() for key, value in qwen[0].state_dict().items()}
    model, processor = swapped(qwen, "patch_merger")
    model.model.visual.merger.mlp[0].weight.data.add_(1.0)
    assert type(qwen[0]) is Qwen2_5_VLForConditionalGeneration and processor is not qwen[1]
    assert all(torch.equal(state[key], value) for key, value in qwen[0].state_dict().items())
    assert model.state_dict().keys() == state.keys()
