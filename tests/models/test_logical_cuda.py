"""``SvpRis`` on a CUDA device that a CPU pretends to have: no operation mixes devices, in any form of the model.

``cuda:1``, while the current device is ``cuda:0``: what goes to "cuda" without saying which one is found as well.
"""

from __future__ import annotations

import contextlib
import functools
from copy import deepcopy

import numpy as np
import pytest
import torch

from lavis_svp.common.transfer import SharingCollate, move_to_device
from lavis_svp.projectors import list_projectors
from lavis_svp.vision import feature_extractor
from lavis_svp.vision.sam import build_sam

DEVICE = "cuda:1"
TINY = {
    "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
    "auxiliary_losses": {"grounding": 1.0, "word_alignment": 1.0, "place_alignment": 1.0, "point_regression": 1.0},
    "visual_tokens": {"norm": True, "shuffle": True},
    "losses": {"resolution": "low"},
}
"""The tiny recipe's differences from the paper."""
PHOTOS = {
    **TINY,
    "classifier": {"side": 64},
    "prompt": {"style": "plain", "answers": ["[SEG]"]},
    "seg_prompt": {**TINY["seg_prompt"], "pointer_nouns": True, "pointer_absent": True, "region_mask": True},
    "auxiliary_losses": {**TINY["auxiliary_losses"], "regions": 1.0},
    "visual_tokens": {**TINY["visual_tokens"], "class_words": True, "drawn_classes": 0.7},
    "vision_encoder": {"extra_channels": ["sam", "classifier", "classes"]},
    "no_target": {"bias": 1, "evidence": 1},
}
"""Those of the recipe for photographs."""
SAM = {"name": "sam", "points_per_side": 4, "pred_iou": 0.1, "stability": 0.1}
PROJECTORS = {
    "avg_pool": {"tokens_h": 2, "tokens_w": 2},
    "c_abstractor": {"tokens_h": 2, "tokens_w": 2},
    "ldp_v2": {"tokens_h": 2, "tokens_w": 2},
    "pixel_shuffle": {"ratio": 2},
    "token_packer": {"scale": 2},
    "svp": {"sspe_width": 16, "mask_size": 8},
}
CASES = {
    "paper": {},
    "tiny": TINY,
    "photos": PHOTOS,
    "extra_channels": {"vision_encoder": {"extra_channels": ["sam", "colour"]}},
    "conversation": {"layout": "conversation"},
    "separate": {"layout": "separate"},
    "pad": {"vision_encoder": {"fit": "pad"}, **TINY},
    "lora": {"language": {"tuning": "lora", "gradient_checkpointing": True}},
    "sam": {"superpixels": {**SAM, "points_per_side": 8}},
    "sam_full": {"superpixels": {**SAM, "decisions": "full", "clean_area": 4}},
    "sam_plain": {"superpixels": {**SAM, "decoder": "plain"}},
    "no_target": {**TINY, "prompt": {"style": "plain", "answers": ["[SEG]."]}, "no_target": {"bias": 1, "evidence": 1}},
    "few_masks": {"sam": {"max_masks_per_image": 1}},
    "frozen_decoder": {"sam": {"train_decoder": False}, "language": {"train_embeddings": "all"}},
} | {
    f"projector_{name}": {"projector": {"name": name, **PROJECTORS.get(name, {})}}
    for name in list_projectors()
    if name != "svp"
}  # fmt: skip
SLOW = {"few_masks", "separate", "sam_plain"} | {
    f"projector_{name}" for name in ("avg_pool", "ldp_v2", "mask_pool", "patch_merger", "pixel_shuffle", "perceiver")
}
"""Forms whose operations are those of other forms."""


@pytest.fixture(scope="module")
def read_sam():
    """What builds SAM, called once: its weights are the same in every form of the model."""
    return functools.cache(lambda *args, **kwargs: build_sam(*args, **kwargs))


@pytest.fixture
def on_device(devices, make_model, read_sam, monkeypatch):
    """``on_device(sections)``: a context with a model of that form on the device."""
    monkeypatch.setattr(feature_extractor, "build_sam", lambda *args, **kwargs: deepcopy(read_sam(*args, **kwargs)))

    @contextlib.contextmanager
    def build(sections):
        model = make_model(**sections)
        with devices.LogicalCuda() as cuda:
            yield model.to(DEVICE), cuda
        cuda.check()
        assert not cuda.doubles, sorted(set(map(str, cuda.doubles)))

    return build


@pytest.fixture
def batch(batch):
    """The batch with its images as data sets send them."""
    return {**batch, "image": (batch["image"][:, :3] * 255).round().to(torch.uint8)}


def delivered(model, batch, training):
    """The batch as a loader delivers it: prepared, in page-locked memory, then copied to the model's device."""
    ready = SharingCollate(None, model.batch_preparer(training))(batch)
    pinned = {key: value.pin_memory() if hasattr(value, "pin_memory") else value for key, value in ready.items()}
    return move_to_device(pinned, DEVICE)


def with_cached_features(model, batch):
    """The batch as a data set sends it where the features are cached."""
    vision = model.extractor(batch)
    named = {name: getattr(vision.patches, name) for name in ("patches", "valid", *model.extractor.encoder_outputs)}
    named["patches"] = named["patches"][..., : model.extractor.vision_encoder.dim]  # without the extra channels
    given = {"sam": vision.sam} | ({} if vision.classifier is None else {"classifier": vision.classifier})
    entries = [
        {name: value[index].cpu() for name, value in {**named, **given}.items()} for index in range(len(vision.sam))
    ]
    maps = {} if vision.region_maps is None else {"region_map": vision.region_maps}
    return {key: value for key, value in batch.items() if key != "image"} | {"frozen": entries, **maps}


def learn(model, samples):
    model.train()(samples)["loss"].backward()
    assert all(p.grad.device == p.device for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_every_form_of_the_model_stays_on_its_device(on_device, batch, case):
    with on_device(CASES[case]) as (model, _):
        learn(model, delivered(model, batch, training=True))
        predictions = model.predict_masks(delivered(model, batch, training=False))
        assert [len(row) for row in predictions] == [3, 1] and isinstance(predictions[0][0].mask, np.ndarray)


@pytest.mark.parametrize("form", ["paper", "tiny", "photos"])
def test_every_way_in_stays_on_its_device(on_device, batch, form):
    """Batches that no loader prepared, cached features, forced answers, captions, and answers by rank."""
    with on_device(CASES[form]) as (model, _):
        samples = move_to_device(batch, DEVICE)
        learn(model, samples)
        cached = with_cached_features(model, samples)
        learn(model, delivered(model, cached, training=True))
        model.predict_masks(move_to_device(cached, DEVICE), mode="teacher_forced")
        images = {key: samples[key] for key in ("image", "original_size")}
        assert all(isinstance(text, str) for text in model.generate(images))
        answers = ["a cat", "a dog", "red"]
        said = model.predict_answers(
            {**images, "text_input": ["what?", "who?"]}, inference_method="rank", answer_list=answers,
            num_ans_candidates=2,
        )  # fmt: skip
        assert set(said) <= set(answers)
        words = {**images, "text_input": ["what?", "who?"], "text_output": ["a cat", "a dog"]}
        learn(model, delivered(model, words, training=True))


def test_half_precision_and_another_device_stay_on_it(on_device, batch):
    with on_device(CASES["tiny"]) as (model, _):
        model.to(torch.bfloat16).eval().predict_masks(delivered(model, batch, training=False))
        model.to("cuda:0").predict_masks({**batch, "image": batch["image"].cuda()})


def test_the_guard_sees_a_part_that_was_left_on_the_cpu(on_device, batch):
    with pytest.raises(AssertionError, match="lavis_svp/projectors/svp/"), on_device({}) as (model, _):
        model.projector.sspe.cpu()
        model(delivered(model, batch, training=True))
