"""How often the host waits for the device: at most six times a training step, four and one per four tokens a prediction.

The steps of whole runs are counted in tests/runners/test_logical_cuda.py.
"""

from __future__ import annotations

import pytest
import torch

from lavis_svp.common.transfer import SharedBatch, SharingCollate, move_to_device

DEVICE = "cuda:1"
MOST_READS_OF_A_STEP = 6
MOST_READS_OF_A_PREDICTION, TOKENS_PER_READ = 4, 4
MOST_COPIES = 2  # to the device, for which the host waits
TINY = {
    "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
    "auxiliary_losses": {"grounding": 1.0, "word_alignment": 1.0, "place_alignment": 1.0, "point_regression": 1.0},
    "visual_tokens": {"norm": True, "shuffle": True},
    "losses": {"resolution": "low"},
}
FORMS = {"paper": {}, "tiny": TINY}


@pytest.fixture
def batch(batch):
    """The batch with its images as data sets send them."""
    return {**batch, "image": (batch["image"][:, :3] * 255).round().to(torch.uint8)}


def delivered(model, batch, training):
    """The batch as it comes to the training step: through shared memory, pinned, prepared."""
    collate = SharingCollate(None, model.batch_preparer(training))
    pinned = SharedBatch(collate(batch)).pin_memory()
    return move_to_device(pinned, DEVICE)


def counted(cuda, work):
    """What the host waited for, the second time: constants are on the device then."""
    work()
    with cuda.counting() as waits:
        result = work()
    return waits, result


@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_hardly_waits(devices, make_model, batch, form):
    model = make_model(**FORMS[form])
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE)
        waits, loss = counted(cuda, lambda: model(delivered(model, batch, training=True))["loss"].backward())
    assert len(waits.reads) <= MOST_READS_OF_A_STEP and len(waits.copies) <= MOST_COPIES, waits.table()


@pytest.mark.parametrize("mode", ["generative", "teacher_forced"])
@pytest.mark.parametrize("form", FORMS)
def test_predicting_masks_hardly_waits(devices, make_model, batch, form, mode):
    model = make_model(**FORMS[form]).eval()
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE)
        samples = {key: batch[key] for key in ("image", "original_size", "text_input")}
        waits, rows = counted(cuda, lambda: model.predict_masks(delivered(model, samples, training=False), mode=mode))
    tokens = model.language.options.max_new_tokens if mode == "generative" else 0
    most = MOST_READS_OF_A_PREDICTION + tokens // TOKENS_PER_READ
    assert [len(row) for row in rows] == [3, 1]
    assert len(waits.reads) <= most and len(waits.copies) <= MOST_COPIES, waits.table()


def test_an_evaluation_that_comes_unprepared_hardly_waits(devices, make_model, batch):
    model = make_model().eval()
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE)
        samples = {**batch, "image": batch["image"].to(DEVICE)}
        waits, _ = counted(cuda, lambda: model.predict_masks(samples))
    most = MOST_READS_OF_A_PREDICTION + model.language.options.max_new_tokens // TOKENS_PER_READ
    assert len(waits.reads) <= most and len(waits.copies) <= MOST_COPIES, waits.table()
