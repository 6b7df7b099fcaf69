"""BLIP-2 with superpixels on a CUDA device that a CPU pretends to have: no operation of ours mixes devices."""

from __future__ import annotations

import pytest

from lavis_svp.common.transfer import move_to_device

DEVICE = "cuda:1"


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_blip2_stays_on_its_device(devices, make, samples, kind):
    model = make(kind)
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE).train()
        batch = move_to_device(samples, DEVICE)
        model(batch)["loss"].backward()
        model.eval()
        for beams in (1, 2):
            assert len(model.generate({**batch, "prompt": "a"}, max_length=4, num_beams=beams)) == 3
        assert len(model.predict_answers(batch, prompt="Question: {} Short answer:", max_len=3)) == 3
    assert not {str(fault) for fault in cuda.faults if fault.place.startswith("lavis_svp/")}
    assert not {str(event) for event in cuda.doubles if event.place.startswith("lavis_svp/")}
