"""How often the host waits for the device, and how often it copies to it.

The host reads at most six times of the device in a training step, and four times and once per four tokens in a
prediction. It waits for no copy to the device. A batch that is prepared with its superpixels is one copy. The steps of
whole runs are counted in tests/runners/test_logical_cuda.py.
"""

from __future__ import annotations

import pytest
import torch

from lavis_svp.common.transfer import SharedBatch, SharingCollate, move_to_device

DEVICE = "cuda:1"
MOST_READS_OF_A_STEP = 6
MOST_READS_OF_A_PREDICTION, TOKENS_PER_READ = 4, 4
TINY = {
    "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
    "auxiliary_losses": {"grounding": 1.0, "word_alignment": 1.0, "place_alignment": 1.0, "point_regression": 1.0},
    "visual_tokens": {"norm": True, "shuffle": True},
    "losses": {"resolution": "low"},
    "vision_encoder": {"extra_channels": ["sam", "colour"]},
}
SAM = {"superpixels": {"name": "sam", "points_per_side": 4, "first_stride": 2, "pred_iou": 0.5, "stability": 0.5}}
ONE_PASS = {"superpixels": {"name": "one_pass", "max_superpixels": 30}}
PHOTOS = {
    **TINY,
    "classifier": {"side": 64},
    "prompt": {"style": "plain", "answers": ["[SEG]"]},
    "seg_prompt": {**TINY["seg_prompt"], "pointer_nouns": True, "pointer_absent": True, "region_mask": True},
    "auxiliary_losses": {**TINY["auxiliary_losses"], "regions": 1.0},
    "visual_tokens": {**TINY["visual_tokens"], "class_words": True, "drawn_classes": 0.7},
    "vision_encoder": {"extra_channels": ["sam", "colour", "classifier"]},
}
FORMS = {
    "paper": {},
    "tiny": TINY,
    "sam": SAM,
    "sam, tiny": {**TINY, **SAM},
    "one pass": ONE_PASS,
    "one pass, tiny": {**TINY, **ONE_PASS},
    "photos": PHOTOS,
    "one pass, photos": {**PHOTOS, **ONE_PASS},
}
MADE_ON_THE_WAY = {form: 3 if form.startswith("sam") else 1 for form in FORMS}
"""Copies for superpixels: what is made of them; and SAM's prompts, those of its second pass."""
SHUFFLE = 1  # the tokens' order in training, drawn by the CPU's generator
DRAWN = 1  # what classes objects are taken for, likewise
QUESTIONS_AND_ANSWERS = {"generative": 2, "teacher_forced": 1}
"""Copies for the texts of a prediction, the places where answers grow."""


@pytest.fixture
def batch(batch):
    """The batch with its images as data sets send them."""
    return {**batch, "image": (batch["image"][:, :3] * 255).round().to(torch.uint8)}


def delivered(model, batch, training):
    """The batch as it comes to the training step: through shared memory, pinned, prepared; not on the device yet."""
    collate = SharingCollate(None, model.batch_preparer(training))
    return SharedBatch(collate(batch)).pin_memory()


def with_region_maps(model, batch):
    with torch.no_grad():
        return {**batch, "region_map": model.extractor(batch).region_maps}


def counted(cuda, work):
    """What the host waited for, the second time: constants are on the device then."""
    work()
    with cuda.counting() as waits:
        result = work()
    return waits, result


@pytest.mark.parametrize("maps_known", [True, False], ids=["maps", "no maps"])
@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_hardly_waits(devices, make_model, batch, form, maps_known):
    model = make_model(**FORMS[form])
    batch = with_region_maps(model, batch) if maps_known else batch
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE)
        ready = delivered(model, batch, training=True)
        waits, _ = counted(cuda, lambda: model(move_to_device(ready, DEVICE))["loss"].backward())
    assert len(waits.reads) <= MOST_READS_OF_A_STEP and not waits.copies, waits.table()
    shuffled = SHUFFLE if model.options.visual_tokens.shuffle else 0
    drawn = DRAWN if model.options.visual_tokens.drawn_classes else 0
    assert len(waits.transfers) <= 1 + shuffled + drawn + (0 if maps_known else MADE_ON_THE_WAY[form]), waits.table()


@pytest.mark.parametrize("maps_known", [True, False], ids=["maps", "no maps"])
@pytest.mark.parametrize("mode", ["generative", "teacher_forced"])
@pytest.mark.parametrize("form", FORMS)
def test_predicting_masks_hardly_waits(devices, make_model, batch, form, mode, maps_known):
    model = make_model(**FORMS[form]).eval()
    batch = with_region_maps(model, batch) if maps_known else batch
    samples = {key: batch[key] for key in ("image", "original_size", "text_input", "region_map") if key in batch}
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE)
        ready = delivered(model, samples, training=False)
        waits, rows = counted(cuda, lambda: model.predict_masks(move_to_device(ready, DEVICE), mode=mode))
    tokens = model.language.options.max_new_tokens if mode == "generative" else 0
    most = MOST_READS_OF_A_PREDICTION + tokens // TOKENS_PER_READ
    assert [len(row) for row in rows] == [3, 1]
    assert len(waits.reads) <= most and not waits.copies, waits.table()
    on_the_way = 0 if maps_known else MADE_ON_THE_WAY[form]
    assert len(waits.transfers) <= 1 + QUESTIONS_AND_ANSWERS[mode] + on_the_way, waits.table()


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_that_comes_unprepared_hardly_waits(devices, make_model, batch, form):
    model = make_model(**FORMS[form]).eval()
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE)
        samples = {**batch, "image": batch["image"].to(DEVICE)}
        waits, _ = counted(cuda, lambda: model.predict_masks(samples))
    most = MOST_READS_OF_A_PREDICTION + model.language.options.max_new_tokens // TOKENS_PER_READ
    assert len(waits.reads) <= most and not waits.copies, waits.table()
