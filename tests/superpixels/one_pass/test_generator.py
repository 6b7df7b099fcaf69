"""The one-pass generator with a head of random weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lavis_svp.superpixels import RegionMap, SamEmbedding, build_superpixels
from lavis_svp.superpixels.generator import target_count
from lavis_svp.superpixels.one_pass.generator import OnePassSuperpixels
from lavis_svp.superpixels.one_pass.head import BoundaryHead, boundary_strength
from lavis_svp.superpixels.one_pass.options import OnePassOptions
from lavis_svp.superpixels.one_pass.weights import HeadFacts, save_head

Embed = Callable[..., SamEmbedding]
Make = Callable[..., OnePassSuperpixels]

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 80), st.integers(1, 80))


@pytest.fixture(scope="module")
def make(random_head_file: Path) -> Make:
    """Builds the generator; its finest map has every region unless the options say otherwise."""

    def build(**options: object) -> OnePassSuperpixels:
        generator = build_superpixels("one_pass", **{"head": str(random_head_file), "min_strength": 0.0, **options})
        assert isinstance(generator, OnePassSuperpixels)
        return generator

    return build


def is_finer(fine: RegionMap, coarse: RegionMap) -> bool:
    """Whether every region of ``coarse`` is a union of regions of ``fine``."""
    pairs = np.unique(np.stack([fine.labels.ravel(), coarse.labels.ravel()]), axis=1)
    return pairs.shape[1] == fine.count


def test_gives_regions_over_the_image_and_leaves_the_embedding_alone(make: Make, embed: Embed) -> None:
    given_ones = [embed(0), embed(1, (128, 37)), embed(2, (60, 64), side=64)]
    before = copy.deepcopy(given_ones)
    maps = make()(embeddings=given_ones)
    assert [one.size for one in maps] == [(46, 64), (64, 20), (30, 32)]
    assert all(one.count > 5 and one.coverage() == 1 for one in maps)
    for one, old in zip(given_ones, before, strict=True):
        assert torch.equal(one.embedding, old.embedding) and torch.equal(one.image, old.image)


def test_boundaries_are_the_heads_where_the_image_is(make: Make, embed: Embed, random_head: BoundaryHead) -> None:
    (found,) = make().boundaries([embed(3, (90, 49))])
    with torch.inference_mode():
        expected = random_head(embed(3, (90, 49)).embedding[None], embed(3, (90, 49)).image[None])
    strength = boundary_strength(expected.boundaries)[0, :23, :13]
    assert found.strength.shape == (23, 13) and found.strength.dtype == np.float32
    assert np.allclose(found.strength, strength, atol=1e-5) and np.ptp(found.strength) > 0.1
    assert np.allclose(found.affinities, expected.affinities[0, :, :12, :7], atol=1e-4)


@few
@given(st.lists(st.tuples(seeds, sizes, st.sampled_from([64, 128])), min_size=2, max_size=4))
def test_an_image_is_not_touched_by_its_batch_mates(
    make: Make, embed: Embed, images: list[tuple[int, tuple[int, int], int]]
) -> None:
    given_ones = [embed(seed, (min(h, side), min(w, side)), side) for seed, (h, w), side in images]
    generator = make()
    for one, source in zip(generator(embeddings=given_ones), given_ones, strict=True):
        assert np.array_equal(one.labels, generator(embeddings=[source])[0].labels)


@few
@given(seeds, sizes)
def test_the_map_covers_the_image_and_nothing_else(make: Make, embed: Embed, seed: int, size: tuple[int, int]) -> None:
    (regions,) = make()(embeddings=[embed(seed, size)])
    assert (
        regions.size == (2 * -(-size[0] // 4), 2 * -(-size[1] // 4)) and regions.coverage() == 1 and regions.count >= 1
    )


@few
@given(seeds, sizes, st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_counts_are_exact_and_nested(
    make: Make, embed: Embed, seed: int, size: tuple[int, int], counts: list[int]
) -> None:
    generator, source = make(), embed(seed, size)
    (hierarchy,) = generator.hierarchies([source])
    counts = sorted(counts)
    maps = generator.at_counts(source, counts)
    assert [one.count for one in maps] == [min(count, hierarchy.count) for count in counts]
    for coarse, fine in zip(maps, maps[1:], strict=False):
        assert is_finer(fine, coarse)


@few
@given(seeds, st.lists(st.floats(0, 1), min_size=2, max_size=5), st.floats(0, 0.4))
def test_the_dial_gives_nested_maps_and_the_numbers_it_promises(
    make: Make, embed: Embed, seed: int, values: list[float], min_strength: float
) -> None:
    generator, source = make(min_strength=min_strength), embed(seed, (60, 64), 64)
    (hierarchy,) = generator.hierarchies([source])
    finest = hierarchy.count_at(min_strength)
    maps = generator.at_granularities(source, sorted(values))
    wanted = [target_count(finest, OnePassOptions(granularity=value)) for value in sorted(values)]
    assert [one.count for one in maps] == wanted
    for coarse, fine in zip(maps, maps[1:], strict=False):
        assert is_finer(fine, coarse)
    alone = make(min_strength=min_strength, granularity=values[0])(embeddings=[source])[0]
    again = generator.at_granularities(source, values[:1])[0]
    assert np.array_equal(alone.labels, again.labels)


def test_the_dial_runs_from_ten_regions_to_all_and_the_budget_holds(make: Make, embed: Embed) -> None:
    everything = make(min_strength=0.0)
    all_of_them = everything(embeddings=[embed()])[0].count
    coarse, fine = everything.at_granularities(embed(), [0.0, 1.0])
    assert coarse.count == 10 < fine.count == all_of_them
    limited = make(min_strength=0.0, max_superpixels=12)
    assert limited(embeddings=[embed()])[0].count == 12 == limited.region_limit
    assert make(max_superpixels=None).region_limit is None
    assert [one.count for one in limited.at_granularities(embed(), [0.0, 1.0])] == [10, 12]


@few
@given(seeds, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_higher_min_strength_never_gives_more_regions(
    make: Make, embed: Embed, seed: int, values: tuple[float, float]
) -> None:
    low, high = (make(min_strength=value)(embeddings=[embed(seed, (60, 64), 64)])[0] for value in sorted(values))
    assert high.count <= low.count and is_finer(low, high)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (1, 128), (128, 1), (128, 128)])
def test_any_shape_of_image(make: Make, embed: Embed, size: tuple[int, int]) -> None:
    (regions,) = make()(embeddings=[embed(3, size)])
    assert regions.size == (2 * -(-size[0] // 4), 2 * -(-size[1] // 4)) and regions.coverage() == 1


@pytest.mark.parametrize("size", [(1024, 1), (1, 1024), (1024, 1024)])
def test_side_1024(make: Make, embed: Embed, size: tuple[int, int]) -> None:
    (regions,) = make(max_superpixels=50)(embeddings=[embed(4, size, side=1024)])
    assert regions.coverage() == 1 and 1 <= regions.count <= 50
    assert regions.size == (-(-size[0] // 4), -(-size[1] // 4))  # enlarged up to side 512 alone


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_blank_image_has_at_least_one_region(make: Make, embed: Embed, level: float) -> None:
    blank = embed()._replace(embedding=torch.zeros(256, 8, 8), image=torch.full((3, 32, 32), level))
    for strength in (0.0, 0.1, 1.0):
        (regions,) = make(min_strength=strength)(embeddings=[blank])
        assert regions.count >= 1 and regions.coverage() == 1


def test_the_same_input_gives_the_same_regions(make: Make, embed: Embed) -> None:
    labels = [make()(embeddings=[embed(4)])[0].labels for _ in range(2)]
    assert np.array_equal(*labels)
    assert make()(embeddings=[]) == []


def test_autocast_and_half_precision_embeddings_are_taken(make: Make, embed: Embed) -> None:
    expected = make()(embeddings=[embed()])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(make()(embeddings=[embed()])[0].labels, expected.labels)
    half = embed()._replace(embedding=embed().embedding.half(), image=embed().image.bfloat16())
    assert make()(embeddings=[half])[0].coverage() == 1


def test_the_head_is_no_part_of_a_model_and_learns_nothing(make: Make, embed: Embed) -> None:
    generator = make()
    source = embed()._replace(embedding=embed().embedding.requires_grad_())
    assert not isinstance(generator, torch.nn.Module) and generator(embeddings=[source])[0].count > 1
    twin = copy.deepcopy(generator)
    assert twin.settings() == generator.settings()


def test_settings_tell_weights_encoder_and_options_apart(
    make: Make, random_head: BoundaryHead, random_head_file: Path, tmp_path: Path
) -> None:
    known = make().settings()
    assert known["generator"] == "one_pass" and known["version"] == 1 and "head" not in known
    assert json.loads(json.dumps(known)) == known == make(encoder_name=lambda: "").settings()
    for options in (
        {"min_strength": 0.2},
        {"granularity": 0.5},
        {"max_superpixels": 9},
        {"encoder_name": "tiny_vit@384:x"},
    ):
        assert make(**options).settings() != known
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(random_head_file.read_bytes())
    assert make(head=str(copied)).settings() == known
    other = random_head.folded()
    with torch.no_grad():
        other.spread.bias += 0.1
    save_head(tmp_path / "other", other, HeadFacts("tiny_vit", (128,)))
    assert make(head=str(tmp_path / "other")).settings()["weights"] != known["weights"]


def test_the_encoders_name_is_asked_for_once_and_late(make: Make) -> None:
    calls: list[int] = []
    generator = make(encoder_name=lambda: calls.append(1) or "tiny_vit@128:ab")
    assert not calls
    assert generator.settings()["encoder"] == "tiny_vit@128:ab" == generator.settings()["encoder"] and len(calls) == 1


@pytest.mark.parametrize("encoder", [{"encoder_name": "vit_h@1024:ab"}, {"encoder_name": str, "encoder_kind": "vit_h"}])
def test_a_head_of_another_encoder_is_warned_of(make: Make, encoder: dict) -> None:
    with pytest.warns(UserWarning, match=r"trained on embeddings of SAM's tiny_vit, but .* vit_h's.*superpixels train"):
        make(**encoder)


def test_a_head_that_fits_or_cannot_tell_is_not_warned_of(
    make: Make, random_head: BoundaryHead, tmp_path: Path
) -> None:
    save_head(tmp_path / "unknown", random_head, HeadFacts("", (128,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
        make(encoder_name="tiny_vit@384:ab")
        make(encoder_name=str, encoder_kind="tiny_vit")
        make(encoder_name="vit_h@1024:ab", head=str(tmp_path / "unknown"))


def test_bad_input_is_named(make: Make, embed: Embed) -> None:
    generator, good = make(), embed()
    with pytest.raises(ValueError, match="pass embeddings="):
        generator([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match="reads the image at stride 4"):
        generator(embeddings=[good._replace(image=None)])
    for bad, message in (
        (good._replace(embedding=torch.zeros(32, 8, 8)), r"side 128 is \(256, 8, 8\), got \(32, 8, 8\)"),
        (good._replace(side=256), r"side 256 is \(256, 16, 16\), got \(256, 8, 8\)"),
        (good._replace(image=torch.zeros(3, 128, 128)), r"is \(3, 32, 32\) float RGB in 0..1, got \(3, 128, 128\)"),
        (good._replace(image=torch.zeros(3, 32, 32, dtype=torch.uint8)), "got .* torch.uint8"),
        (good._replace(image=good.image * 255), "holds .* values that are NaN or not within 0..1: divide"),
        (good._replace(input_size=(129, 5)), "does not lie within"),
        (good._replace(input_size=(0, 5)), "does not lie within"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            generator(embeddings=[good, bad])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"granularity must lie in 0..1, got 1.5"):
        generator.at_granularities(good, [0.5, 1.5])
    with pytest.raises(ValueError, match=r"at least 1 superpixel, but counts is \[3, 0\]"):
        generator.at_counts(good, [3, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["image", "padding"])
def test_numbers_that_are_none_are_an_error(make: Make, embed: Embed, value: float, where: str) -> None:
    """Wherever they are: a ReLU turns minus infinity into 0, so the result would not tell."""
    row = 1 if where == "image" else 7
    spoilt = embed(0, (64, 128))
    spoilt.embedding[3, row, 1] = value
    with pytest.raises(ValueError, match="embedding holds 1 NaN or infinite values"):
        make()(embeddings=[embed(1), spoilt])
    spoilt = embed(0, (64, 128))
    spoilt.image[1, 4 * row, 1] = value
    with pytest.raises(ValueError, match="image at stride 4 holds 1 values that are NaN"):
        make()(embeddings=[spoilt])


def test_on_a_gpu_the_host_waits_once_for_all_images(make: Make, embed: Embed, devices: Any) -> None:
    given_ones = [embed(0), embed(1, (60, 64), side=64), embed(2, (128, 37))]
    expected = make()(embeddings=given_ones)
    with devices.LogicalCuda() as cuda, cuda.counting() as waits:
        on_device = [
            one._replace(
                embedding=one.embedding.to("cuda:1", non_blocking=True), image=one.image.to("cuda:1", non_blocking=True)
            )
            for one in given_ones
        ]
        generator = make()
        generator(embeddings=on_device[:1])  # the head's copy on the device
        with cuda.counting() as waits:
            found = generator(embeddings=on_device)
    cuda.check()
    assert not cuda.doubles and not waits.copies and len(waits.reads) == 1, waits.table()
    for one, other in zip(found, expected, strict=True):
        assert one.count > 1 and (one.labels == other.labels).mean() > 0.98  # float noise of stacked images


def test_clocks_wait_for_the_device(make: Make, embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr("lavis_svp.superpixels.one_pass.generator.wait_for", waits.append)
    _, seconds = make().timed(embed())
    assert waits == [torch.device("cpu")] and set(seconds) == {"superpixels"}
