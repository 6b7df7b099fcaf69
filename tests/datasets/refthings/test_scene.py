from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from lavis_svp.datasets.refthings.config import RefThingsConfig
from lavis_svp.datasets.refthings.render import blur_of, noise_of
from lavis_svp.datasets.refthings.scene import choose_things, edge_gaps, make_sprite, sample_composition

CONFIG = RefThingsConfig(long_side=160)


def compositions(materials, split="train", count=25, config=CONFIG):
    rng = np.random.default_rng(1)
    found = [sample_composition(rng, split, materials, config) for _ in range(count)]
    return [one for one in found if one is not None]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_things_are_visible_and_of_their_sizes(materials, split):
    found = compositions(materials, split)
    assert len(found) > 10
    for composition in found:
        scene = composition.scene
        height, width = scene.size
        assert max(scene.size) == 160 and composition.backdrop.shape == (height, width, 3)
        assert composition.background.split == split
        share = scene.areas / (height * width)
        assert share.min() >= CONFIG.min_area and share.max() <= CONFIG.max_area
        assert scene.masks.sum(axis=0).max() == 1
        whole = np.array([one.mask(height, width).sum() for one in composition.placed])
        assert (scene.areas >= CONFIG.min_visible * whole).all()
        assert np.allclose(scene.hidden.sum(axis=1) >= 1 - scene.areas / whole - 1e-9, True)
        for one, mask, box in zip(composition.placed, scene.masks, scene.boxes, strict=True):
            assert one.thing.held_out == (split != "train")
            assert scene.blocked.isdisjoint(one.thing.names)
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            if one.thing.cut:
                assert one.y + one.sprite.shape[0] == height


def test_without_overlap_things_keep_a_gap(materials):
    config = RefThingsConfig(long_side=160, overlap_share=0.0)
    for composition in compositions(materials, config=config):
        scene = composition.scene
        assert not scene.hidden.any()
        for index, mask in enumerate(scene.masks):
            away = distance_transform_edt(1 - mask)
            others = [away[other > 0].min() for number, other in enumerate(scene.masks) if number != index]
            assert not others or min(others) >= 5


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_unique_scenes_share_no_name_others_have_rivals(materials, seed):
    for share, config in (
        (1.0, RefThingsConfig(unique_share=1.0)),
        (0.0, RefThingsConfig(unique_share=0.0, rival_share=1.0)),
    ):
        things = choose_things(np.random.default_rng(seed), materials, "train", 4, frozenset(["bus"]), config)
        names = [thing.name for thing in things]
        assert "bus" not in names and len(things) == 4
        if share:
            assert len(set(names)) == len(names)
        else:
            for number, thing in enumerate(things[1:], start=1):
                earlier = things[:number]
                alike = any(thing.name == one.name or set(thing.kinds) & set(one.kinds) for one in earlier)
                assert alike or not thing.kinds or not all(one.kinds for one in earlier)


@given(st.floats(0.2, 3), st.booleans(), st.floats(-30, 30))
@settings(max_examples=40, deadline=None)
def test_sprites_have_no_dark_fringe(scale, mirrored, angle):
    cutout = np.zeros((40, 30, 4), np.uint8)  # transparent black around a bright square
    cutout[8:32, 6:24] = (250, 200, 150, 255)
    sprite = make_sprite(cutout, scale, mirrored, angle)
    alpha = sprite[..., 3]
    edge = alpha > 0.2
    color = sprite[edge][:, :3] / alpha[edge][:, None] * 255
    assert np.abs(color - (250, 200, 150)).max() < 30  # the cubic kernel's ringing at most
    area = (alpha > 0.5).sum()
    assert area == pytest.approx(24 * 18 * scale**2, rel=0.35, abs=12)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_gaps_are_near_the_exact_distances(seed):
    rng = np.random.default_rng(seed)
    masks = np.zeros((3, 80, 100), np.uint8)
    for mask in masks:
        x, y = rng.integers(0, 70), rng.integers(0, 50)
        mask[y : y + 20, x : x + 20] = 1
    gaps = edge_gaps(masks)
    assert np.array_equal(gaps, gaps.T)
    for one in range(3):
        for other in range(3):
            exact = distance_transform_edt(1 - masks[one])[masks[other] > 0].min()
            assert abs(gaps[one, other] - exact) <= 7


def test_blur_and_noise_are_estimated():
    import cv2

    rng = np.random.default_rng(0)
    sharp = np.kron(rng.integers(0, 2, (12, 12)) * 160 + 40, np.ones((16, 16))).astype(np.uint8)
    sharp = np.repeat(sharp[..., None], 3, -1)
    estimates = [blur_of(cv2.GaussianBlur(sharp, (0, 0), sigma)) for sigma in (0.8, 1.5, 2.5)]
    assert estimates == sorted(estimates)
    assert all(0.6 * sigma < one < 1.7 * sigma for sigma, one in zip((0.8, 1.5, 2.5), estimates, strict=True))
    noisy = np.clip(128 + 6 * rng.standard_normal((96, 96, 1)), 0, 255).repeat(3, -1).astype(np.uint8)
    assert noise_of(noisy) == pytest.approx(6, rel=0.25)
    assert noise_of(np.full((32, 32, 3), 90, np.uint8)) == 0
