"""Every host on a CUDA device that a CPU pretends to have: no operation of ours mixes devices.

Faults in lines of transformers or LAVIS are not ours: the unchanged hosts have them as well.
"""

from __future__ import annotations

import pytest
import torch

from lavis_svp.hosts import list_hosts, swap_projector

DEVICE = "cuda:1"
HOSTS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "qwen": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2": "<|vision_start|><|image_pad|><|vision_end|>",
}
"""The fixture of each host of transformers, and how its prompts say "an image"."""
CHOICES = {"svp": {"sspe_width": 32, "mask_size": 8}, "avg_pool": {"tokens_h": 2, "tokens_w": 2}}


def our_faults(cuda):
    return sorted({str(fault) for fault in cuda.faults if fault.place.startswith("lavis_svp/")})


@pytest.mark.parametrize("projector", CHOICES)
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_of_transformers_stays_on_its_device(devices, request, image, host, projector):
    original = request.getfixturevalue(host)
    model, processor = swap_projector(*original, projector, superpixels="felzenszwalb", **CHOICES[projector])
    one = HOSTS[host]
    prompts, images = [f"What is {one} this?", f"{one} and {one}: which?"], [[image(0)], [image(1), image(2, 80, 40)]]
    inputs = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(~inputs["attention_mask"].bool(), -100)
    with devices.LogicalCuda() as cuda:
        model.to(DEVICE).train()
        inputs = inputs.to(DEVICE)
        model(**inputs, labels=labels.to(DEVICE)).loss.backward()
        model.eval()
        beams = (1,) if host == "llava" else (1, 2)  # LLaVA's own beams repeat images by themselves
        for count in beams:
            written = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=count)
            assert written.device == torch.device(DEVICE)
    assert not our_faults(cuda)
    assert not {str(event) for event in cuda.doubles if event.place.startswith("lavis_svp/")}


def test_every_host_of_transformers_is_here(request):
    kinds = {request.getfixturevalue(host)[0].config.model_type for host in HOSTS}
    assert kinds == set(list_hosts()) - {"Blip2OPT", "Blip2T5"}  # LAVIS's are in blip2/
