"""LLaVA-NeXT and LLaVA-OneVision: the canvas of an image in the hosts' own arithmetic, and what follows from it."""

from __future__ import annotations

from copy import copy, deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextImageProcessorFast,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension

from lavis_svp.hosts import swap_projector
from lavis_svp.hosts.anyres import assemble, lay_out, squared_canvas, tiled_canvas
from lavis_svp.hosts.llava_next import max_views
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
    made = assemble(views, canvases)
    first = 0
    for p, canvas in enumerate(canvases):
        (height, width), (tall, wide) = canvas.shown, canvas.grid
        assert tall % multiple == wide % multiple == 0 and 0 <= tall - height < multiple > wide - width >= 0
        assert made.grids[p] == canvas.grid and int(made.valid[p].sum()) == height * width
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


# ---------------------------------------------------------------- the models


@pytest.fixture(params=["llava_next", "llava_onevision"])
def host(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def test_mlp_with_images_in_one_flat_list(host, image):
    model, processor = swap_projector(*host, "mlp")
    images = [image(seed, *size) for seed, size in enumerate([(40, 130), (90, 31), (12, 14)])]
    settings = {"text": ["What is <image> this?", "<image> and <image>?"], "padding": True, "return_tensors": "pt"}
    before, after = (p(images=images, **settings) for p in (host[1], processor))
    assert torch.equal(before["input_ids"], after["input_ids"])
    assert torch.equal(host[0](**before).logits, model.eval()(**after).logits)


@torch.no_grad()
def test_a_superpixel_spans_tiles_and_is_the_mean_of_its_patches(host, image):
    """Left and right halves of an image of 2 x 2 tiles: each spans two tiles, one above the other."""
    model, processor = swap_projector(*host, "mask_pool", superpixels="felzenszwalb")
    halves = RegionMap.from_labels(np.repeat(np.array([[0, 1]], np.int32), 28, axis=1).repeat(56, 0))
    inputs = processor(text="<image>?", images=[[image(3, 56, 56)]], region_maps=[halves], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2
    layer = model.config.vision_feature_layer
    hidden = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[layer]
    tiles = hidden[1:, -9:].reshape(2, 2, 3, 3, -1)
    means = torch.stack([tiles[:, column].mean((0, 1, 2)) for column in range(2)])
    canvases = model.model.canvases(inputs["image_sizes"])
    made, counts = model.model.visual_tokens(inputs["pixel_values"], inputs["image_sizes"], canvases, inputs)
    assert counts == [2] and torch.allclose(made, host[0].model.multi_modal_projector(means), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "svp", "vision_zip"])
def test_bfloat16(host, name, image):
    small = {"mlp": {}, "svp": {"sspe_width": 32, "mask_size": 8}, "vision_zip": {"dominant": 5, "contextual": 2}}[name]
    half = deepcopy(host[0]).to(torch.bfloat16)
    model, processor = swap_projector(half, host[1], name, superpixels="felzenszwalb", **small)
    inputs = processor(text="What is <image> this?", images=[[image(0, 40, 130)]], return_tensors="pt")
    rough = model.eval()(**inputs.to(torch.bfloat16)).logits
    assert rough.dtype == torch.bfloat16 and rough.isfinite().all()
    if name == "mlp":
        inputs = processor(text="What is <image> this?", images=[[image(0, 40, 130)]], return_tensors="pt")
        assert torch.allclose(rough.float(), host[0](**inputs).logits, atol=0.1)


def test_wrong_views_are_refused(host, image):
    model, processor = swap_projector(*host, "svp", superpixels="felzenszwalb", sspe_width=32, mask_size=8)
    with pytest.raises(ValueError, match="not on videos"):
        model(input_ids=torch.ones(1, 2, dtype=torch.int64), pixel_values_videos=torch.zeros(1, 2, 3, 28, 28))
    inputs = processor(text="<image>?", images=image(0), return_tensors="pt")
    with pytest.raises(ValueError, match="need image_sizes"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="do_pad"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][0]})
    other = copy(host[1])
    other.image_processor = deepcopy(host[1].image_processor)
    other.image_processor.image_grid_pinpoints = [[56, 28]]
    with pytest.raises(ValueError, match="processor that belongs to the model"):
        swap_projector(host[0], other, "svp")


def test_views_of_several_sides_are_refused(llava_next):
    model, processor = llava_next
    other = copy(processor)
    other.image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )  # fmt: skip
    with pytest.raises(ValueError, match="square views of one side"):
        swap_projector(model, other, "svp")


@torch.no_grad()
def test_llava_next_also_works_with_its_fast_image_processor(llava_next, image):
    slow = llava_next[1]
    settings = {key: getattr(slow.image_processor, key) for key in ("size", "crop_size", "image_grid_pinpoints")}
    fast = LlavaNextProcessor(LlavaNextImageProcessorFast(**settings), slow.tokenizer, slow.patch_size, "default")
    made = []
    for processor in (slow, fast):
        model, processor = swap_projector(llava_next[0], processor, "svp", superpixels="felzenszwalb", mask_size=8)
        inputs = processor(text="<image>, <image>", images=[image(1), image(2, 90, 40)], return_tensors="pt")
        made.append(inputs)
        assert model.eval()(**inputs).logits.isfinite().all()
    assert torch.equal(made[0]["input_ids"], made[1]["input_ids"])
    assert torch.equal(made[0]["superpixel_weights"], made[1]["superpixel_weights"])


def test_onevision_tiles_a_single_image_and_shows_several_whole():
    sizes, canvas_sizes = [(50, 60), (20, 60), (60, 18), (90, 80)], [[28, 28], [56, 56]]
    canvases = lay_out(sizes, [1, 2, 1], canvas_sizes, 28, 9)
    assert [canvas.base for canvas in canvases] == [True, False, False, True]
    assert [canvas.views for canvas in canvases] == [5, 1, 1, 5]
    assert canvases[1].grid == (2, 3) and canvases[2].grid == (3, 2)  # without the padding
    assert all(canvas.base for canvas in lay_out(sizes, None, canvas_sizes, 28, 9))
    with pytest.raises(ValueError, match="3 images"):
        lay_out(sizes, [1, 2], canvas_sizes, 28, 9)


def test_the_pooling_setting_of_onevision():
    assert max_views("anyres_max_9") == 9
    for wrong in ("pad", "anyres_max_", "anyres_max_x", "anyres"):
        with pytest.raises(ValueError, match="vision_aspect_ratio"):
            max_views(wrong)


@torch.no_grad()
def test_mlp_is_pooled_as_onevision_pools(llava_onevision, image):
    model, processor = swap_projector(*llava_onevision, "mlp")
    large = [processor(text="<image>", images=image(1, *size), return_tensors="pt") for size in ((56, 56), (84, 28))]
    tokens = [int((inputs["input_ids"] == model.config.image_token_id).sum()) for inputs in large]
    # 36 and 27 patches against 2 views of 9: sides shrink by sqrt(2) and sqrt(1.5), 6 x 6 to 4 x 4, 9 x 3 to 7 x 2
    assert tokens == [9 + 4 * 5, 9 + 7 * 3]


def test_the_embeddings_of_onevision_stay_tied(llava_onevision, tmp_path):
    model, _ = swap_projector(*llava_onevision, "mask_pool", superpixels="felzenszwalb")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
