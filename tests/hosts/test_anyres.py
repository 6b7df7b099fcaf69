"""The canvas of an image: the hosts' own arithmetic and order of tiles, and where its patches lie."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension

from lavis_svp.hosts.anyres import assemble, squared_canvas, tiled_canvas
from lavis_svp.projectors import PatchFeatures, Superpixels
from lavis_svp.superpixels import RegionMap

sizes = st.tuples(st.integers(4, 900), st.integers(4, 900))
PATCH = 8
PINPOINTS = [[s * a, s * b] for s in (26,) for a, b in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1))]


def pinpoints(side):
    return [[height // 26 * side, width // 26 * side] for height, width in PINPOINTS]


def tower(side, patch):
    vision = SimpleNamespace(image_size=side, patch_size=patch)
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints(side)))


@given(sizes, st.sampled_from([(24, 8), (26, 8), (27, 8), (64, 8)]))
@example((900, 4), (27, 8))
@example((4, 4), (24, 8))
def test_packed_tokens_are_what_the_hosts_count_and_give(size, tile):
    side, patch = tile
    canvas = tiled_canvas(size, pinpoints(side), side, patch)
    per_view = (side // patch) ** 2
    views = [torch.zeros(canvas.views, per_view, 2)]
    newline, image_sizes = torch.ones(2), torch.tensor([size])
    images = SimpleNamespace(image_grid_pinpoints=pinpoints(side))
    processor = SimpleNamespace(
        image_processor=images, patch_size=patch, num_additional_image_tokens=0, num_image_tokens=per_view,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    model = tower(side, patch)
    next_packed = LlavaNextModel.pack_image_features(model, views, image_sizes, "full", newline)[0][0]
    assert canvas.packed_tokens() == len(next_packed)
    one_packed = LlavaOnevisionModel.pack_image_features(model, views, image_sizes, newline, "anyres_max_2")[0][0]
    assert canvas.packed_tokens(2) == len(one_packed)
    for cls, most in ((LlavaNextProcessor, None), (LlavaOnevisionProcessor, 2)):
        processor._get_unpadded_features = lambda *a, cls=cls: cls._get_unpadded_features(processor, *a)
        assert cls._get_number_of_features(processor, *size, side, side) == canvas.packed_tokens(most)


@given(sizes, st.sampled_from([(24, 8), (26, 8), (40, 8)]))
@example((900, 4), (24, 8))
def test_every_patch_that_shows_some_of_the_image_and_no_other(size, tile):
    """Against the canvas painted in pixels: 1 where the image stands, by the image processor's own arithmetic."""
    side, patch = tile
    tiled = tiled_canvas(size, pinpoints(side), side, patch)
    height, width = (count * side for count in tiled.tiles)
    images = LlavaNextImageProcessor()
    shown = get_patch_output_size(np.zeros((*size, 3), np.uint8), (height, width), ChannelDimension.LAST)
    (top, _), (left, _) = images._get_padding_size(shown, (height, width))
    painted = np.zeros((height, width), np.float32)
    painted[top : top + shown[0], left : left + shown[1]] = 1
    tiles = painted.reshape(tiled.tiles[0], side, tiled.tiles[1], side).transpose(0, 2, 1, 3).reshape(-1, 1, side, side)
    views = np.concatenate([np.ones((1, 1, side, side), np.float32), tiles])
    seen = brightness(views, tiled, patch)
    share = Superpixels.from_masks([torch.ones(1, 60, 80)], [tiled.grid], [tiled.edges], mask_size=5)
    assert torch.allclose(share.weights.reshape(tiled.grid), seen, atol=1e-5)
    every = views[1:, 0, : side // patch * patch, : side // patch * patch]
    assert np.isclose(float(seen.sum()) * patch**2, every.sum())  # nothing shown is left out
    assert (seen > 0).all() or every.sum() == 0


def test_a_image_within_the_gap_between_two_tiles_has_the_nearest_patch():
    canvas = tiled_canvas((1, 1000), [[52, 52]], 26, 8)
    assert canvas.grid == (1, 6)


def brightness(pixels, canvas, patch):
    """What the patches of the canvas see, cut from what the host's image processor gave."""
    views = torch.as_tensor(np.asarray(pixels))[: canvas.views]
    side = views.shape[-1] // patch * patch
    cells = views[:, 0, :side, :side].unfold(1, patch, patch).unfold(2, patch, patch)  # (V, n, n, p, p)
    features = PatchFeatures.whole(cells.mean((-1, -2)).flatten(1)[..., None], (side // patch, side // patch))
    return assemble(features, [canvas]).patches[0, :, 0].reshape(canvas.grid)


@pytest.mark.parametrize("size", [(120, 70), (70, 120), (100, 100), (33, 260), (64, 49)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("side", [64, 68])
def test_a_painted_corner_is_seen_where_its_superpixel_lies(size, corner, side):
    """Through the hosts' real image processors; at 68 pixels a tile has 4 that belong to no patch."""
    labels = np.zeros(size, np.int32)
    rows = slice(0, size[0] // 3) if corner[0] == 0 else slice(size[0] - size[0] // 3, None)
    columns = slice(0, size[1] // 3) if corner[1] == 0 else slice(size[1] - size[1] // 3, None)
    labels[rows, columns] = 1
    image = Image.fromarray((labels * 255).astype(np.uint8)).convert("RGB")
    plain = {"do_normalize": False, "image_grid_pinpoints": pinpoints(side), "resample": Image.Resampling.BILINEAR}
    crop = {"height": side, "width": side}
    following = LlavaNextImageProcessor(size={"shortest_edge": side}, crop_size=crop, **plain)
    onevision = LlavaOnevisionImageProcessor(size=crop, image_mean=[0.0] * 3, **plain)
    tiled, squared = tiled_canvas(size, pinpoints(side), side, PATCH), squared_canvas(size, side, PATCH)
    seen = [
        (following(image)["pixel_values"][0], tiled),
        (onevision(image)["pixel_values"][0], tiled),
        (onevision([[image, image]])["pixel_values"][0], squared),
    ]
    region_map = RegionMap.from_labels(labels)
    for pixels, canvas in seen:
        made = Superpixels.from_region_maps([region_map], [canvas.grid], [canvas.edges], mask_size=None)
        painted = int(region_map.labels[rows, columns][0, 0])
        share = made.weights[0, painted].reshape(canvas.grid)
        found = brightness(pixels, canvas, PATCH)
        assert (found - share).abs().max() < 0.01  # of a patch: what resizing blurs


@given(sizes, st.sampled_from([(24, 8), (26, 8)]))
def test_patches_added_to_reach_a_multiple_show_nothing(size, tile):
    canvas, plain = (tiled_canvas(size, pinpoints(tile[0]), *tile, multiple) for multiple in (4, 1))
    masks = [torch.ones(1, 30, 40)]
    share = Superpixels.from_masks(masks, [canvas.grid], [canvas.edges]).weights.reshape(canvas.grid)
    height, width = canvas.shown
    wanted = Superpixels.from_masks(masks, [plain.grid], [plain.edges]).weights.reshape(height, width)
    assert torch.allclose(share[:height, :width], wanted)
    assert not share[height:].any() and not share[:, width:].any()


@pytest.mark.parametrize("multiple", [1, 4])
def test_assembling_against_an_obvious_loop(multiple):
    """Grids of up to 9 x 6 patches, with 4 extended to 12 x 8: what is added lies below and to the right, invalid."""
    sizes = [(70, 120), (120, 70), (50, 50)]
    canvases = [tiled_canvas(size, pinpoints(24), 24, 8, multiple) for size in sizes[:2]]
    canvases.append(squared_canvas(sizes[2], 24, 8, multiple))
    total = sum(canvas.views for canvas in canvases)
    draw = torch.Generator().manual_seed(0)
    views = PatchFeatures.whole(torch.rand(total, 9, 5, generator=draw), (3, 3))
    views.levels = torch.rand(total, 2, 9, 5, generator=draw)
    views.cls_attention = torch.rand(total, 9, generator=draw).softmax(1)
    views.keys = torch.rand(total, 9, 4, generator=draw)
    views.summary = torch.rand(total, 5, generator=draw)
    made = assemble(views, canvases)
    first = 0
    for p, canvas in enumerate(canvases):
        (height, width), (tall, wide) = canvas.shown, canvas.grid
        assert tall % multiple == wide % multiple == 0 and 0 <= tall - height < multiple > wide - width >= 0
        assert made.grids[p] == canvas.grid and int(made.valid[p].sum()) == height * width
        assert torch.equal(made.summary[p], views.summary[first])
        tiles = canvas.tiles[0] * canvas.tiles[1]
        for y, x in ((y, x) for y in range(height) for x in range(width)):
            row, column, n = canvas.rows[y], canvas.columns[x], y * wide + x
            assert made.valid[p, n]
            tile = row // 3 * canvas.tiles[1] + column // 3 + first + int(canvas.base)
            cell = row % 3 * 3 + column % 3
            assert torch.equal(made.patches[p, n], views.patches[tile, cell])
            assert torch.equal(made.levels[p, :, n], views.levels[tile, :, cell])
            assert torch.equal(made.keys[p, n], views.keys[tile, cell])
            assert torch.allclose(made.cls_attention[p, n], views.cls_attention[tile, cell] / tiles)
        first += canvas.views
    assert not made.patches[~made.valid].any() and not made.keys[~made.valid].any()
    with pytest.raises(ValueError, match="made of .* views of"):
        assemble(views, canvases[:2])
