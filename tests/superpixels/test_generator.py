"""What every superpixel generator promises, over the registry: the tests of its interface."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from lavis_svp.superpixels import SamEmbedding, SuperpixelGenerator, build_superpixels, list_superpixels
from lavis_svp.superpixels.generator import COARSEST, ON_SAM_EMBEDDINGS, target_count
from lavis_svp.superpixels.one_pass.options import OnePassOptions
from lavis_svp.superpixels.sam.options import SamSuperpixelOptions

SIDE, WIDTH = 128, 256
SIZES = [(128, 128), (90, 128), (128, 37), (1, 1), (1, 128)]
Build = Callable[..., SuperpixelGenerator]


@pytest.fixture(scope="module")
def build(random_head_file: Path) -> Build:
    """Builds a generator of the registry by its name; those that need weights get random ones."""
    torch.manual_seed(0)
    prompt_encoder = PromptEncoder(WIDTH, (SIDE // 16,) * 2, (SIDE, SIDE), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=64, num_heads=4)
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=32)
    needed: dict[str, dict[str, Any]] = {
        "sam": {
            "prompt_encoder": prompt_encoder.eval(),
            "mask_decoder": decoder.eval(),
            **{"points_per_side": 4, "pred_iou": -10.0, "stability": 0.0, "box_nms": 1.0, "unlabelled": "nearest"},
        },
        "one_pass": {"head": str(random_head_file), "min_strength": 0.0},
    }
    return lambda name, **options: build_superpixels(name, **{**needed.get(name, {}), **options})


@pytest.fixture(scope="module")
def source_of(embed: Callable[..., SamEmbedding]) -> Callable[[SuperpixelGenerator, int, tuple[int, int]], Any]:
    """Makes what a generator takes: an embedding or an image of a size."""

    def make(generator: SuperpixelGenerator, seed: int, size: tuple[int, int]) -> Any:
        if generator.needs_embedding:
            return embed(seed, size, SIDE)
        return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)

    return make


def run(generator: SuperpixelGenerator, sources: list[Any]) -> list[Any]:
    return generator(embeddings=sources) if generator.needs_embedding else generator(sources)


@pytest.mark.parametrize("name", list_superpixels())
def test_any_size_is_covered_alike_alone_and_in_a_batch(name: str, build: Build, source_of: Callable) -> None:
    generator = build(name)
    sources = [source_of(generator, seed, size) for seed, size in enumerate(SIZES)]
    before = copy.deepcopy(sources)
    maps = run(generator, sources)
    assert len(maps) == len(SIZES) and all(one.count >= 1 and one.coverage() == 1 for one in maps)
    for source, one in zip(sources, maps, strict=True):
        assert np.array_equal(generator.segment(source).labels, one.labels)
    for one, old in zip(sources, before, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, old, strict=True))
    assert run(generator, []) == []


@pytest.mark.parametrize("name", list_superpixels())
def test_settings_are_json_and_name_the_generator(name: str, build: Build) -> None:
    known = build(name).settings()
    assert known["generator"] == name and known["version"] >= 1 and json.loads(json.dumps(known)) is not None
    assert json.dumps(known) == json.dumps(build(name).settings())


@pytest.mark.parametrize("name", list_superpixels())
def test_what_it_needs_is_asked_for_and_options_are_checked(
    name: str, build: Build, embed: Callable[..., SamEmbedding]
) -> None:
    generator = build(name)
    assert generator.name == name and generator.needs_embedding == (name in ON_SAM_EMBEDDINGS)
    assert generator.needs_embedding or not generator.needs_image
    with pytest.raises(ValueError, match="pass embeddings=" if generator.needs_embedding else "pass images="):
        generator() if not generator.needs_embedding else generator([np.zeros((4, 4, 3), np.uint8)])
    without = embed()._replace(image=None)
    if generator.needs_image:
        with pytest.raises(ValueError, match="give SamEmbedding image="):
            generator(embeddings=[embed(), without])
    elif generator.needs_embedding:
        assert generator(embeddings=[without])[0].count >= 1
    with pytest.raises(ValueError, match="Unknown key 'colour_of_the_frame'"):
        build(name, colour_of_the_frame=3)


@pytest.mark.parametrize("name", ON_SAM_EMBEDDINGS)
def test_generators_on_embeddings_share_the_dial_and_the_budget(
    name: str, build: Build, embed: Callable[..., SamEmbedding]
) -> None:
    every = {"sam": {"points_per_side": 8, "min_area": 0.0, "containment": None}, "one_pass": {"max_superpixels": None}}
    options = every[name]
    counts = [one.count for one in build(name, **options).at_granularities(embed(), [0.0, 0.5, 1.0])]
    assert counts[0] == COARSEST < counts[1] < counts[2]
    assert counts[1] == round(COARSEST + 0.5 * (counts[2] - COARSEST))
    limited = build(name, **{**options, "max_superpixels": 7})
    assert limited(embeddings=[embed()])[0].count == 7 == limited.region_limit
    spoilt = embed()
    spoilt.embedding[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds 1 NaN or infinite values"):
        limited(embeddings=[embed(1), spoilt])


@pytest.mark.parametrize("options", [SamSuperpixelOptions, OnePassOptions])
@pytest.mark.parametrize("count", [1, 9, 10, 11, 400])
def test_target_count_means_the_same_for_both(options: Callable[..., Any], count: int) -> None:
    wanted = [target_count(count, options(granularity=step / 10, max_superpixels=None)) for step in range(11)]
    assert wanted == sorted(wanted) and wanted[0] == min(count, COARSEST) and wanted[-1] == count
    assert target_count(count, options(max_superpixels=None)) == count
    assert target_count(count, options(granularity=1.0, max_superpixels=3)) == min(3, count)
