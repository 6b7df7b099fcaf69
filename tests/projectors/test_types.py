"""Superpixels from region maps and masks, against a loop over pixels; packed tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.tensors import CellEdges
from lavis_svp.projectors import Superpixels, VisualTokens
from lavis_svp.projectors.layers import pooling_weights, raster_order
from lavis_svp.projectors.types import HostTokens
from lavis_svp.superpixels.region_map import RegionMap


def slow_shares(labels, count, grid, extent):
    """Share of each grid cell that each region covers: pixel rectangles cut with cell rectangles, one by one."""
    (height, width), (h, w) = labels.shape, grid
    tall, wide = extent[0] * h / height, extent[1] * w / width  # a pixel, in cells
    out = np.zeros((count, h, w))
    for y in range(height):
        for x in range(width):
            if labels[y, x] < 0:
                continue
            for row in range(h):
                high = max(0.0, min(row + 1, (y + 1) * tall) - max(row, y * tall))
                for column in range(w):
                    broad = max(0.0, min(column + 1, (x + 1) * wide) - max(column, x * wide))
                    out[labels[y, x], row, column] += high * broad
    return out


def random_map(rng, height, width, regions):
    labels = rng.integers(-1, regions, (height, width))
    labels.flat[0] = 0
    return RegionMap.from_labels(labels)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    extent=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
)
def test_from_region_maps_equals_slow_loop(seed, size, grid, extent):
    region_map = random_map(np.random.default_rng(seed), *size, regions=4)
    superpixels = Superpixels.from_region_maps([region_map], [grid], [extent], mask_size=(3, 5))
    weights = slow_shares(region_map.labels, region_map.count, grid, extent)
    masks = slow_shares(region_map.labels, region_map.count, (3, 5), extent)
    assert np.allclose(superpixels.weights[0].view(-1, *grid), weights, atol=1e-5)
    assert np.allclose(superpixels.masks[0], masks, atol=1e-5)


def test_images_of_different_size_are_padded():
    rng = np.random.default_rng(0)
    maps = [random_map(rng, 11, 7, 3), random_map(rng, 5, 9, 6)]
    superpixels = Superpixels.from_region_maps(maps, [(6, 4), (3, 3)], [(1.0, 1.0), (0.5, 1.0)], mask_size=8)
    assert superpixels.weights.shape == (2, maps[1].count, 24) and superpixels.masks.shape[2:] == (8, 8)
    assert superpixels.valid.sum(1).tolist() == [maps[0].count, maps[1].count]
    assert superpixels.weights[0, maps[0].count :].eq(0).all() and superpixels.weights[1, :, 9:].eq(0).all()
    alone = Superpixels.from_region_maps(maps[:1], [(6, 4)], mask_size=8)
    assert torch.equal(superpixels.weights[0, : maps[0].count], alone.weights[0])


def test_region_smaller_than_a_patch_keeps_its_area():
    labels = np.full((100, 100), -1)
    labels[33, 71] = 0
    weights = Superpixels.from_region_maps([RegionMap.from_labels(labels)], [(4, 4)], mask_size=None).weights
    assert weights.sum().item() == pytest.approx(16 / 100**2, rel=1e-4)
    assert weights[0, 0].argmax() == 1 * 4 + 2


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_from_masks_equals_from_region_maps_and_may_overlap(kind):
    region_map = random_map(np.random.default_rng(3), 13, 8, 4)
    masks = torch.from_numpy(region_map.masks()).to(kind)
    made, expected = (
        Superpixels.from_masks([masks, masks[:0]], [(3, 4)] * 2, mask_size=6),
        Superpixels.from_region_maps([region_map], [(3, 4)], mask_size=6),
    )
    assert torch.allclose(made.weights[0], expected.weights[0], atol=1e-6)
    assert torch.allclose(made.masks[0], expected.masks[0], atol=1e-6)
    assert not made.valid[1].any()
    twice = Superpixels.from_masks([torch.ones(2, 5, 5)], [(2, 2)], mask_size=None)
    assert twice.masks is None and torch.allclose(twice.weights, torch.ones(1, 2, 4))


def test_superpixels_on_cells_anywhere_on_the_image():
    """An image of two halves in the middle of a row of five cells, with a gap within the second half."""
    columns = torch.tensor([[-0.5, 0.0], [0.0, 0.5], [0.5, 0.75], [0.8, 1.05], [1.05, 1.3]], dtype=torch.float64)
    edges = CellEdges(torch.tensor([[0.0, 1.0]], dtype=torch.float64), columns)
    halves = RegionMap.from_labels(np.array([[0, 1]]))
    made = Superpixels.from_region_maps([halves], [(1, 5)], [edges], mask_size=(1, 10))
    assert torch.allclose(made.weights[0], torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0.8, 0]]))
    wanted = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0.6, 0, 0]])
    assert made.masks is not None and torch.allclose(made.masks[0, :, 0], wanted)
    of_masks = Superpixels.from_masks([torch.tensor([[[1.0, 0]], [[0, 1.0]]])], [(1, 5)], [edges], mask_size=None)
    assert torch.equal(of_masks.weights, made.weights)


def test_counts_and_extents_are_checked():
    region_map = RegionMap.whole_image((4, 4))
    with pytest.raises(ValueError, match="1 maps, 2 grids"):
        Superpixels.from_region_maps([region_map], [(2, 2), (2, 2)])
    with pytest.raises(ValueError, match="extent"):
        Superpixels.from_region_maps([region_map], [(2, 2)], [(1.2, 1.0)])
    edges = CellEdges(*[torch.tensor([[0.0, 1.0]])] * 2)
    with pytest.raises(ValueError, match="2x1 patches"):
        Superpixels.from_masks([torch.ones(1, 2, 2)], [(2, 1)], [edges])
    with pytest.raises(ValueError, match="S, H, W"):
        Superpixels.from_masks([torch.ones(4, 4)], [(2, 2)])


def test_packed_leaves_padding_out():
    tokens = torch.arange(12.0).view(2, 3, 2)
    packed, lengths = VisualTokens(tokens, torch.tensor([[True, True, False], [True, False, False]])).packed()
    assert lengths == [2, 1] and packed.tolist() == [[0, 1], [2, 3], [6, 7]]


def some_tokens():
    tokens = torch.arange(12.0).view(2, 3, 2)
    valid, order = torch.tensor([[True, True, False], [True, False, False]]), torch.tensor([[1, 0, -1], [-1, -1, -1]])
    return VisualTokens(tokens, valid, torch.eye(3).expand(2, 3, 3), order)


def test_the_host_asks_for_counts_and_order_once():
    visual = some_tokens()
    assert visual.on_host == HostTokens([2, 1], [[1, 0], [-1]]) and visual.counts == [2, 1]
    assert visual.on_host is visual.on_host
    plain = VisualTokens(visual.tokens, visual.valid)
    assert plain.on_host == HostTokens([2, 1], None)
    assert dataclasses.replace(visual, order=visual.order.flip(1)).host is None  # what it knew is another's


@pytest.mark.parametrize("known", [False, True])
def test_shuffled_tokens_keep_their_superpixels(known):
    visual = some_tokens()
    visual.tokens = visual.tokens * visual.valid[..., None]
    if known:
        assert visual.counts == [2, 1]
    moves = set()
    for seed in range(8):
        torch.manual_seed(seed)
        shuffled = visual.shuffled()
        assert (shuffled.host is not None) == known
        host = shuffled.on_host
        assert host == VisualTokens(shuffled.tokens, shuffled.valid, None, shuffled.order).on_host
        torch.manual_seed(seed)
        expected = (torch.rand(2, 3) + (~visual.valid).float()).argsort(1)
        assert torch.equal(shuffled.tokens, visual.tokens[torch.arange(2)[:, None], expected])
        assert torch.equal(shuffled.assignment, visual.assignment[torch.arange(2)[:, None], expected])
        moves.add(tuple(host.order[0]))
    assert moves == {(0, 1), (1, 0)}


def test_an_assignment_is_made_when_it_is_read():
    calls = []

    def make():
        calls.append(1)
        return torch.eye(3).expand(2, 3, 3)

    given = some_tokens()
    visual = VisualTokens(given.tokens, given.valid, make, given.order)
    clean = visual.with_tokens(given.tokens + 1).shuffled()
    assert not calls
    assert clean.assignment.sum(2).eq(clean.valid).all() and len(calls) == 1
    assert clean.assignment is clean.assignment and len(calls) == 1
    visual.assignment = None
    assert visual.assignment is None and visual.shuffled().assignment is None


def test_region_maps_bring_the_order_of_their_tokens():
    rng = np.random.default_rng(1)
    maps = [random_map(rng, 11, 7, 3), random_map(rng, 5, 9, 6)]
    grids = [(6, 4), (3, 3)]
    made = Superpixels.from_region_maps(maps, grids, mask_size=None)
    assert made.host.counts == [map.count for map in maps]
    for index, grid in enumerate(grids):
        count, cells = maps[index].count, grid[0] * grid[1]
        means = pooling_weights(made.weights[index : index + 1, :count, :cells], torch.ones(1, cells, dtype=torch.bool))
        place = torch.arange(cells)[None]
        order = raster_order(means, torch.ones(1, count, dtype=torch.bool), place // grid[1], place % grid[1])
        assert made.order[index, :count].tolist() == made.host.order[index] == order[0].tolist()
    assert made.to("cpu").host == made.host
    assert dataclasses.replace(made, weights=made.weights * 0).order is None
