"""What only Qwen2.5-VL has: dynamic resolution, positions of M-RoPE, a merger whose files stay compatible."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorFast,
)

from lavis_svp.hosts import swap_projector
from lavis_svp.hosts.qwen_vl import SvpQwen2_5_VLForConditionalGeneration, usual_grid
from lavis_svp.superpixels import RegionMap

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = [f"What is {IMAGE} this?", f"{IMAGE} and {IMAGE}: which is it?"]
SIZES = [(40, 90), (90, 60), (70, 75)]
SMALL = {
    "avg_pool": {"tokens_h": 3, "tokens_w": 2},
    "pixel_shuffle": {"ratio": 2},
    "svp": {"sspe_width": 32, "mask_size": 8},
    "token_packer": {"scale": 2, "num_levels": 2},
}
PROJECTORS = ["svp", "mask_pool", "mlp", "avg_pool", "patch_merger", "vision_zip", "token_packer"]


def swapped(host, name, **choices):
    levels = {"levels": [1, 2]} if name == "token_packer" else {}
    model, processor = swap_projector(
        *host, name, superpixels="felzenszwalb", **levels, **SMALL.get(name, {}), **choices
    )
    return model.eval(), processor


@pytest.fixture(scope="module")
def shared(qwen):
    """Swapped models for tests that change nothing in them."""
    return functools.cache(lambda name, positions="centroid": swapped(qwen, name, positions=positions))


@pytest.fixture
def images(image):
    return [image(seed, *size) for seed, size in enumerate(SIZES)]


@pytest.fixture
def inputs_of(images):
    def make(processor, side="left"):
        return processor(text=PROMPTS, images=images, padding=True, padding_side=side, return_tensors="pt")

    return make


@torch.no_grad()
@pytest.mark.parametrize("positions", ["centroid", "sequential"])
@pytest.mark.parametrize("name", PROJECTORS)
def test_generation_with_cache_equals_without(shared, inputs_of, name, positions):
    model, processor = shared(name, positions)
    inputs = inputs_of(processor)
    said = [model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said) and said[0].shape[1] == inputs["input_ids"].shape[1] + 6


@torch.no_grad()
def test_decoding_step_by_step_gives_the_logits_of_one_pass(shared, inputs_of):
    model, processor = shared("svp")
    inputs = inputs_of(processor)
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    added = out.sequences[:, inputs["input_ids"].shape[1] :]
    whole = {
        **inputs,
        "input_ids": out.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(added)], dim=1),
    }
    assert torch.allclose(model(**whole).logits[:, -6:-1], torch.stack(out.logits, dim=1), atol=1e-5)


@torch.no_grad()
def test_text_after_images_and_a_static_cache(qwen, shared, inputs_of):
    model, processor = shared("svp")
    words = processor(text=["Hello there.", "Hm?"], padding=True, padding_side="left", return_tensors="pt")
    settings = {"max_new_tokens": 5, "do_sample": False}
    fresh = model.generate(**words, **settings)
    said = model.generate(**inputs_of(processor), **settings)
    assert torch.equal(fresh, model.generate(**words, **settings))  # the images' positions are forgotten
    assert torch.equal(fresh, qwen[0].generate(**words, **settings))
    static = model.generate(**inputs_of(processor), **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(said, static)


@torch.no_grad()
def test_the_output_depends_on_the_positions_of_superpixels(qwen, image):
    model, processor = swapped(qwen, "mask_pool")
    sequential, _ = swapped(qwen, "mask_pool", positions="sequential")
    sequential.load_state_dict(model.state_dict())
    one = processor(text=PROMPTS[:1], images=[image(0)], return_tensors="pt")
    logits = model(**one).logits[0, -1]
    assert not torch.allclose(logits, sequential(**one).logits[0, -1], atol=1e-3)


def test_a_saved_projector_keeps_qwens_prefix_and_its_positions(qwen, tmp_path):
    model, _ = swapped(qwen, "svp", positions="sequential")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # as in the published files
        keys = set(file.keys())
    assert any(key.startswith("visual.merger.head.0.") for key in keys) and not any("ln_q" in key for key in keys)
    assert type(model).from_pretrained(tmp_path).model.swap.positions == "sequential"


def test_a_saved_patch_merger_has_the_keys_and_shapes_of_the_host(qwen, shared, tmp_path):
    model, _ = shared("patch_merger")
    model.save_pretrained(tmp_path)
    back = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, config=qwen[0].config)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in qwen[0].state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["svp", "patch_merger"])
def test_bfloat16(qwen, shared, inputs_of, name):
    model, processor = shared(name)
    exact = model(**inputs_of(processor)).logits
    half = SvpQwen2_5_VLForConditionalGeneration(model.config).bfloat16().eval()
    half.load_state_dict(model.state_dict())
    said = half(**inputs_of(processor))
    assert said.logits.dtype == torch.bfloat16 and said.logits.isfinite().all()
    assert torch.nn.functional.cosine_similarity(said.logits.float(), exact, dim=-1).mean() > 0.98
    if name == "patch_merger":
        host = Qwen2_5_VLForConditionalGeneration(qwen[0].config).bfloat16().eval()
        host.load_state_dict(qwen[0].state_dict())
        assert torch.equal(host(**inputs_of(qwen[1])).logits, said.logits)


@torch.no_grad()
def test_region_maps_of_ones_own_see_the_whole_stretched_image(shared, image):
    model, processor = shared("mask_pool")
    halves = RegionMap.from_labels(np.repeat([[0, 1]], 2, axis=0).repeat(20, 0).repeat(40, 1))
    inputs = processor(text=f"{IMAGE}?", images=image(1, 40, 80), region_maps=[halves], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2
    made = model.model.visual_tokens(**{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")})
    height, width = inputs["image_grid_thw"][0, 1:].tolist()
    left = made.assignment[0, 0, : height * width].view(height, width)
    assert left[:, : width // 2].min() > 0 and not left[:, width // 2 :].any()


def test_resolution_limits_are_kept(shared, image):
    _, processor = shared("mlp")
    for limits, patches in (({}, 144), ({"max_pixels": 48 * 48, "min_pixels": 16 * 16}, 36)):
        made = processor(text=IMAGE, images=image(1, 300, 300), return_tensors="pt", **limits)
        time, height, width = made["image_grid_thw"][0].tolist()
        assert height * width <= patches and (made["input_ids"] == processor.image_token_id).sum() == height * width


@pytest.mark.parametrize("name", ["svp", "patch_merger"])
def test_the_fast_image_processor_serves_as_well(shared, image, name):
    _, processor = shared(name)
    fast = Qwen2VLImageProcessorFast(**processor.image_processor.to_dict())
    quick = type(processor)(fast, processor.tokenizer, processor.video_processor, svp=processor.svp)
    settings = {"text": f"{IMAGE}?", "images": image(1), "return_tensors": "pt"}
    made, wanted = quick(**settings), processor(**settings)
    assert all(torch.equal(made[key], wanted[key]) for key in wanted if key != "pixel_values")
    assert torch.allclose(made["pixel_values"], wanted["pixel_values"], atol=0.1)  # two ways of resizing


def test_the_usual_grid_is_that_of_the_published_limits():
    assert usual_grid(Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=16384 * 28 * 28)) == (32, 32)


def test_wrong_inputs_are_refused(qwen, shared, image):
    model, processor = shared("svp")
    inputs = processor(text=f"{IMAGE}?", images=image(0), return_tensors="pt")
    with pytest.raises(ValueError, match="not on videos"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cache holds"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="2 steps in time"):
        model(**{**inputs, "image_grid_thw": torch.tensor([[2, 4, 4]])})
    with pytest.raises(ValueError, match="does not determine the positions"):
        model.model.get_rope_index(inputs["input_ids"], inputs["image_grid_thw"])
    with pytest.raises(ValueError, match="centroid, sequential"):
        swap_projector(*qwen, "svp", positions="diagonal")
    larger = SimpleNamespace(image_processor=Qwen2VLImageProcessor(patch_size=8, min_pixels=32**2, max_pixels=128**2))
    with pytest.raises(ValueError, match="4x4 patches.*multiples of 2"):
        swap_projector(qwen[0], larger, "patch_merger", merge_size=4)
