"""What LLaVA-NeXT and LLaVA-OneVision promise alike: `mlp` as before, ragged batches, generation, files, errors."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lavis_svp.hosts import list_hosts, swap_projector
from lavis_svp.projectors import list_projectors
from lavis_svp.superpixels import RegionMap

PROMPTS = ["What is <image> this?", "<image> and <image>: which is it?", "Words alone.", "Once <image> more"]
SMALL = {
    "avg_pool": {"tokens_h": 2, "tokens_w": 3},
    "c_abstractor": {"tokens_h": 2, "tokens_w": 3, "blocks": 1},
    "dpc_knn": {"count": 5},
    "ldp_v2": {"tokens_h": 2, "tokens_w": 3},
    "perceiver": {"num_queries": 5, "depth": 1, "heads": 2, "head_dim": 8},
    "svp": {"sspe_width": 32, "mask_size": 8},
    "token_packer": {"num_levels": 2},
    "vision_zip": {"dominant": 5, "contextual": 2},
}
RAGGED = ["mlp", "avg_pool", "mask_pool", "svp"]


@pytest.fixture(params=["llava_next", "llava_onevision"])
def host(request):
    return request.getfixturevalue(request.param)


def swapped(host, name):
    levels = (1, 2) if name == "token_packer" else ()
    settings = {"superpixels": "felzenszwalb", "levels": levels, **SMALL.get(name, {})}
    model, processor = swap_projector(*host, name, **settings)
    return model.eval(), processor


@pytest.fixture
def images(image):
    """Wide, high, tiny, large: other canvases all; nested by prompt, the third has none."""
    sizes = [(40, 130), (90, 31), (12, 14), (100, 90)]
    one, two, three, four = (image(seed, *size) for seed, size in enumerate(sizes))
    return [[one], [two, three], [], [four]]


@pytest.fixture
def inputs_of(images):
    def make(processor, side="left"):
        return processor(text=PROMPTS, images=images, padding=True, padding_side=side, return_tensors="pt")

    return make


def alone(processor, images):
    for prompt, own in zip(PROMPTS, images, strict=True):
        yield processor(text=prompt, images=[own] if own else None, return_tensors="pt")


@torch.no_grad()
def test_mlp_is_the_original_bit_for_bit(host, inputs_of):
    model, processor = swapped(host, "mlp")
    before, after = inputs_of(host[1]), inputs_of(processor)
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    assert torch.equal(host[0](**before).logits, model(**after).logits)
    said = [m.generate(**i, max_new_tokens=6, do_sample=False) for m, i in ((host[0], before), (model, after))]
    assert torch.equal(*said)


@torch.no_grad()
def test_mlp_with_images_in_one_flat_list(host, images):
    model, processor = swapped(host, "mlp")
    flat = [image for own in images for image in own]
    before, after = (
        p(text=PROMPTS[:2], images=flat[:3], padding=True, return_tensors="pt") for p in (host[1], processor)
    )
    assert torch.equal(before["input_ids"], after["input_ids"])
    assert torch.equal(host[0](**before).logits, model(**after).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_equals_one_by_one(host, images, inputs_of, name, side):
    model, processor = swapped(host, name)
    together = inputs_of(processor, side)
    positions = (together["attention_mask"].cumsum(1) - 1).clamp_min(0)
    logits = model(**together, position_ids=positions).logits
    for row, single in enumerate(alone(processor, images)):
        real = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][real], single["input_ids"][0])
        assert torch.allclose(logits[row][real], model(**single).logits[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", list_projectors())
def test_every_projector_gives_as_many_tokens_as_placeholders(host, inputs_of, name):
    model, processor = swapped(host, name)
    inputs = inputs_of(processor)
    assert model(**inputs).logits.isfinite().all()
    keys = [key for key in (*model.image_keys, *model.count_keys) if key in inputs]
    counts = model.model.image_counts(**{key: inputs[key] for key in keys})
    assert sum(counts) == int((inputs["input_ids"] == model.config.image_token_id).sum())


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "svp"])
def test_generation_with_cache_equals_without(host, inputs_of, name):
    model, processor = swapped(host, name)
    inputs = inputs_of(processor)
    said = [model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said) and said[0].shape[1] == inputs["input_ids"].shape[1] + 6


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "svp"])
def test_beams_keep_images_with_their_rows(host, images, inputs_of, name):
    model, processor = swapped(host, name)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    together = model.generate(**inputs_of(processor), **settings)
    for row, single in enumerate(alone(processor, images)):
        assert torch.equal(together[row, -5:], model.generate(**single, **settings)[0, -5:])


@pytest.mark.parametrize("name", ["svp", "mlp"])
def test_saved_and_loaded_by_transformers_own_classes(host, inputs_of, name, tmp_path):
    model, processor = swapped(host, name)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, said = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and again.config.model_type == f"svp_{host[0].config.model_type}"
    assert not said["missing_keys"] and not said["unexpected_keys"]
    inputs, reloaded = inputs_of(processor), inputs_of(AutoProcessor.from_pretrained(tmp_path))
    assert all(torch.equal(inputs[key], reloaded[key]) for key in inputs)
    with torch.no_grad():
        # loaded weights lie elsewhere in memory, which may change the last bit of a product
        assert torch.allclose(model(**inputs).logits, again.eval()(**reloaded).logits, atol=1e-6)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert any(key.startswith("model.multi_modal_projector.head.0") for key in again.state_dict())


def test_the_original_is_left_alone(host):
    state = {key: value.clone() for key, value in host[0].state_dict().items()}
    model, _ = swapped(host, "svp")
    model.model.multi_modal_projector.head[0].weight.data.add_(1.0)
    assert all(torch.equal(state[key], value) for key, value in host[0].state_dict().items())
    assert host[0].config.model_type in list_hosts()


def test_training_reaches_the_whole_projector(host, inputs_of):
    model, processor = swapped(host, "svp")
    inputs = inputs_of(processor, "right")
    hidden = (inputs["input_ids"] == model.config.image_token_id) | ~inputs["attention_mask"].bool()
    model(**inputs, labels=inputs["input_ids"].masked_fill(hidden, -100)).loss.backward()
    projector = model.model.multi_modal_projector
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())
    model.zero_grad()


@torch.no_grad()
def test_a_superpixel_spans_tiles_and_is_the_mean_of_its_patches(host, image):
    """Left and right halves of an image of 2 x 2 tiles: each spans two tiles, one above the other."""
    model, processor = swapped(host, "mask_pool")
    halves = RegionMap.from_labels(np.repeat(np.array([[0, 1]], np.int32), 28, axis=1).repeat(56, 0))
    shown = image(3, 56, 56)
    inputs = processor(text="<image>?", images=[[shown]], region_maps=[halves], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2
    layer = model.config.vision_feature_layer
    hidden = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[layer]
    tiles = hidden[1:, -9:].reshape(2, 2, 3, 3, -1)
    means = torch.stack([tiles[:, column].mean((0, 1, 2)) for column in range(2)])
    wanted = host[0].model.multi_modal_projector(means)
    keys = (*model.image_keys, *model.count_keys)
    given = {key: inputs[key] for key in keys if key in inputs and not key.startswith("superpixel")}
    canvases = model.model.canvases(inputs["image_sizes"])
    made, counts = model.model.visual_tokens(given["pixel_values"], given["image_sizes"], canvases, inputs)
    assert counts == [2] and torch.allclose(made, wanted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "svp", "vision_zip"])
def test_bfloat16(host, name, inputs_of):
    model, processor = swapped((deepcopy(host[0]).to(torch.bfloat16), host[1]), name)
    inputs = inputs_of(processor).to(torch.bfloat16)
    rough, exact = model(**inputs).logits, swapped(host, "mlp")[0] if name == "mlp" else None
    assert rough.dtype == torch.bfloat16 and rough.isfinite().all()
    if exact is not None:
        assert torch.allclose(rough.float(), exact(**inputs_of(processor)).logits, atol=0.1)


def test_what_is_wrong(host, image):
    model, processor = swapped(host, "svp")
    with pytest.raises(ValueError, match="not on videos"):
        processor(text="<image>", videos=[image(0)])
    with pytest.raises(ValueError, match="not on videos"):
        model(input_ids=torch.ones(1, 2, dtype=torch.int64), pixel_values_videos=torch.zeros(1, 2, 3, 28, 28))
    inputs = processor(text="<image>?", images=image(0), return_tensors="pt")
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": inputs["attention_mask"][:, 1:]})
    with pytest.raises(ValueError, match="need image_sizes"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="do_pad"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][0]})
    with pytest.raises(ValueError, match="needs superpixels"):
        model(**{key: value for key, value in inputs.items() if not key.startswith("superpixel")})
    pinpoints = host[1].image_processor.image_grid_pinpoints
    try:
        host[1].image_processor.image_grid_pinpoints = [[56, 28]]
        with pytest.raises(ValueError, match="processor that belongs to the model"):
            swap_projector(*host, "svp")
    finally:
        host[1].image_processor.image_grid_pinpoints = pinpoints
