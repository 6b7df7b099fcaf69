"""The generators without a network: any size, deterministic, covering, sensible."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

from lavis_svp.superpixels import build_superpixels, list_superpixels
from lavis_svp.superpixels.generator import ON_SAM_EMBEDDINGS

CLASSICAL = [name for name in list_superpixels() if name not in ON_SAM_EMBEDDINGS]


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[::3, ::2])


@pytest.mark.parametrize("name", CLASSICAL)
def test_covers_the_image_with_some_regions_and_is_deterministic(name: str, photo: np.ndarray) -> None:
    before = photo.copy()
    one, again = build_superpixels(name)([photo, photo])
    assert one.coverage() == 1 and 8 <= one.count <= 60
    assert one.labels.shape == (112, 168)
    assert np.array_equal(one.labels, again.labels) and np.array_equal(photo, before)
    assert np.array_equal(build_superpixels(name)([photo])[0].labels, one.labels)


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (2000, 50), (40, 40)])
def test_any_size_and_a_flat_image(name: str, size: tuple[int, int]) -> None:
    regions = build_superpixels(name)([np.full((*size, 3), 90, np.uint8)])[0]
    assert regions.count >= 1 and regions.coverage() == 1
    assert regions.labels.shape[0] <= size[0] and regions.labels.shape[1] <= size[1]


@pytest.mark.parametrize("name", CLASSICAL)
def test_settings_hold_every_option_and_build_the_same_generator(name: str, photo: np.ndarray) -> None:
    generator = build_superpixels(name, side=64)
    settings = generator.settings()
    assert settings.pop("generator") == name and settings.pop("version") == 1 and settings["side"] == 64
    assert np.array_equal(build_superpixels(name, **settings)([photo])[0].labels, generator([photo])[0].labels)


def test_felzenszwalb_finds_flat_and_textured_objects() -> None:
    scene = np.full((160, 240, 3), (90, 110, 100), np.uint8)
    target = np.zeros((160, 240), bool)
    target[40:110, 60:130] = True
    scene[target] = (200, 40, 40)
    scene[40:110:8, 60:130] //= 2  # dark stripes
    scene[20:60, 170:200] = (40, 60, 210)
    regions = build_superpixels("felzenszwalb")([scene])[0].resized((160, 240))
    assert regions.count < 10
    mask = regions.masks()[regions.labels[75, 95]]
    assert (mask & target).sum() / (mask | target).sum() > 0.9


def test_max_regions_is_kept(photo: np.ndarray) -> None:
    for name in ("felzenszwalb", "slic"):
        assert build_superpixels(name, max_regions=7, merge_cost=0)([photo])[0].count == 7


def test_grid_cells_are_where_they_should_be() -> None:
    regions = build_superpixels("grid", rows=2, cols=3)([np.zeros((40, 60, 3), np.uint8)])[0]
    assert regions.count == 6 and (regions.areas == 400).all()
    assert regions.labels[25, 5] == 3 and regions.boxes[5].tolist() == [40, 20, 60, 40]


def test_voronoi_depends_on_image_and_seed() -> None:
    black, white = np.zeros((50, 50, 3), np.uint8), np.full((50, 50, 3), 255, np.uint8)
    one, other = build_superpixels("voronoi")([black, white])
    reseeded = build_superpixels("voronoi", seed=1)([black])[0]
    assert not np.array_equal(one.labels, other.labels) and not np.array_equal(one.labels, reseeded.labels)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("felzenszwalb", {"sclae": 3}, "did you mean 'scale'"),
        ("felzenszwalb", {"close": 4}, "must be odd"),
        ("slic", {"n_segments": 0}, "at least 1, got 0"),
        ("slic", {"compactness": 0}, "greater than 0"),
        ("voronoi", {"side": float("nan")}, "side must be at least 1"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_superpixels(name, **options)


def test_bad_input_is_named() -> None:
    with pytest.raises(KeyError, match="Did you mean 'felzenszwalb'"):
        build_superpixels("felzenswalb")
    generator = build_superpixels("grid")
    with pytest.raises(ValueError, match="pass images="):
        generator(embeddings=[])
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8 RGB"):
            generator([image])
