"""The order of tokens against loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.projectors.order import centroids, geometry_hash, token_order
from lavis_svp.projectors.pooling import pooling_weights
from lavis_svp.projectors.structures import Superpixels
from lavis_svp.superpixels.region_map import RegionMap


def test_orders():
    rows, columns = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 0, 1]])
    weights = torch.tensor([[[0, 0, 0, 1.0], [0, 0.5, 0, 0], [0, 0, 0, 0.0], [1, 0, 1, 0], [0, 0, 0, 0.5]]])
    valid = torch.tensor([[True, True, False, True, True]])
    means = pooling_weights(weights, torch.ones(1, 4, dtype=torch.bool))
    expected = {"raster": [1, 3, 0, 4, 2], "area": [3, 0, 1, 4, 2], "given": [0, 1, 3, 4, 2]}
    for rule, order in expected.items():
        assert token_order(means, weights.sum(2), valid, rows, columns, rule).tolist() == [order], rule
    with pytest.raises(ValueError, match="raster, area, given, random"):
        token_order(means, weights.sum(2), valid, rows, columns, "columns")


def test_raster_order_does_not_hang_on_rounding():
    rows, columns = torch.arange(9)[None] // 3, torch.arange(9)[None] % 3
    third = torch.tensor([0.1, 0.2, 0.1])
    weights = torch.stack([torch.outer(third, torch.eye(3)[c]).flatten() for c in (2, 0, 1)])[None]
    order = token_order(
        pooling_weights(weights, torch.ones(1, 9, dtype=torch.bool)),
        weights.sum(2),
        torch.ones(1, 3, dtype=torch.bool),
        rows,
        columns,
        "raster",
    )
    assert order.tolist() == [[1, 2, 0]]


def random_order(weights, rows, columns):
    """Token order of one image under "random": (S,)."""
    means = pooling_weights(weights, torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool))
    valid = torch.ones(weights.shape[:2], dtype=torch.bool)
    areas = weights.sum(2, dtype=torch.float64)
    return token_order(means, areas, valid, rows, columns, "random")[0]


def scene(seed, grid=(24, 24), regions=9):
    """Blocks of random size, no two in the same place to a patch; their weights, rows and columns."""
    rng = np.random.default_rng(seed)
    cuts = [np.sort(rng.choice(np.arange(1, 24), regions // 3 - 1, replace=False)) for _ in range(2)]
    bins = [np.searchsorted(cut, np.arange(24), side="right") for cut in cuts]
    region_map = RegionMap.from_labels(bins[0][:, None] * 3 + bins[1][None])
    rows, columns = torch.arange(grid[0] * grid[1])[None] // grid[1], torch.arange(grid[0] * grid[1])[None] % grid[1]
    return Superpixels.from_region_maps([region_map], [grid], mask_size=None).weights, rows, columns


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 40))
def test_random_order_follows_from_the_image_alone(seed, padding):
    weights, rows, columns = scene(seed)
    order = random_order(weights, rows, columns)
    assert sorted(order.tolist()) == list(range(weights.shape[1]))
    assert torch.equal(order, random_order(weights, rows, columns))
    wider = torch.cat([weights, torch.zeros(1, weights.shape[1], padding)], 2)
    places = [torch.cat([values, torch.zeros(1, padding, dtype=torch.long)], 1) for values in (rows, columns)]
    assert torch.equal(order, random_order(wider, *places))
    mixed = torch.randperm(weights.shape[1], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(mixed[random_order(weights[:, mixed], rows, columns)], order)


def test_random_order_has_nothing_to_do_with_place_or_area():
    """Over many images each superpixel comes first about equally often, and ranks do not follow rows or areas."""
    ranks, heights, areas, firsts = [], [], [], torch.zeros(9)
    for seed in range(300):
        weights, rows, columns = scene(seed)
        order = random_order(weights, rows, columns)
        firsts[order[0]] += 1
        ranks.append(order.argsort())
        heights.append(torch.arange(9) // 3)
        areas.append(weights[0].sum(1))
    table = torch.stack([torch.cat(part).float() for part in (ranks, heights, areas)])
    assert torch.corrcoef(table)[0, 1:].abs().max() < 0.06  # 2700 pairs: three standard deviations
    assert firsts.min() > 12 and firsts.max() < 60  # 33 expected


def test_hash_equals_a_slow_loop():
    prime = 2**31 - 1

    def mixed(value):
        return (value % prime * (value % prime) + 48271 * (value % prime) + 1) % prime

    places = torch.tensor([[[0.5, 2.25], [3.125, 1.0], [7.0, 7.0]]], dtype=torch.float64)
    areas, valid = torch.tensor([[4.0, 2.25, 9.0]]), torch.tensor([[True, True, False]])
    own = []
    for (row, column), area in zip(places[0].tolist(), areas[0].tolist(), strict=True):
        value = 0
        for part in (row, column, area**0.5):
            value = mixed(value + int(part * 16 + 0.377))
        own.append(value)
    expected = [mixed(mixed(value + own[0] + own[1])) for value in own]
    assert geometry_hash(places, areas, valid)[0].tolist() == expected


def test_centroids_are_the_mean_of_patch_centres():
    rows, columns = torch.arange(6)[None] // 3, torch.arange(6)[None] % 3
    weights = torch.tensor([[[0, 0, 0, 0, 0, 1.0], [0.5, 0.5, 0, 0, 0, 0]]])
    assert centroids(weights, rows, columns)[0].tolist() == [[1.5, 2.5], [0.5, 1.0]]
