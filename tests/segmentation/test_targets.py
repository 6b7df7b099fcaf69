"""Targets of the losses against slow references: areas cell by cell, superpixels and patches token by token."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.images import nearest
from lavis_svp.common.transfer import Packed, SharedBatch
from lavis_svp.language.nouns import NounFinder
from lavis_svp.segmentation.targets import (
    NO_WORD,
    PLACE_WORDS,
    auxiliary_targets,
    instance_of_region,
    mask_targets,
    object_nouns,
    object_shares,
    patch_shares,
    region_iou,
    word_targets,
    word_token_ids,
)
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.geometry import SamInputGeometry, mask_centre, sam_input_size

SIDE = 64
CELLS = (16, 16)
ALL = ("grounding", "word_alignment", "place_alignment", "point_regression")


def place_of(height, width):
    return SamInputGeometry(SIDE, sam_input_size(height, width, SIDE), (height, width))


def random_mask(rng, size):
    return (rng.random(size) > 0.5).astype(np.uint8)


def random_map(rng):
    return RegionMap.from_labels(rng.integers(-1, 5, size=(12, 9)) if rng.random() < 0.9 else np.zeros((12, 9), int))


def tokenizer(texts, add_special_tokens):
    assert not add_special_tokens and all(text.startswith(" ") for text in texts)
    return {"input_ids": [[ord(letter) for letter in text.strip()] for text in texts]}  # a token a letter


def slow_covered_shares(mask, place, cells):
    """What part of the image inside a cell lies in the mask, in whole numbers."""

    def overlap(cell, count, pixel, pixels, inside):
        start = max(Fraction(cell, count), Fraction(pixel * inside, pixels * SIDE))
        stop = min(Fraction(cell + 1, count), Fraction((pixel + 1) * inside, pixels * SIDE))
        return max(stop - start, Fraction(0))

    axes = [
        [[overlap(c, cells[a], p, mask.shape[a], place.input_size[a]) for p in range(mask.shape[a])] for c in range(n)]
        for a, n in enumerate(cells)
    ]
    rows, columns = ([row for row in axis if sum(row)] for axis in axes)
    return [
        [
            float(
                sum(r * c * int(mask[y, x]) for y, r in enumerate(row) if r for x, c in enumerate(column) if c)
                / (sum(row) * sum(column))
            )
            for column in columns
        ]
        for row in rows
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10_000))
def test_low_targets_are_shares_of_what_the_image_covers(height, width, seed):
    mask, place = random_mask(np.random.default_rng(seed), (height, width)), place_of(height, width)
    targets = mask_targets([mask], [place], "low", CELLS)
    torch.testing.assert_close(targets.low[0], torch.tensor(slow_covered_shares(mask, place, CELLS)), atol=1e-5, rtol=0)
    assert targets.sizes == [tuple(targets.low.shape[1:])] and targets.cells.tolist() == [list(targets.sizes[0])]


@pytest.mark.parametrize("size", [(30, 64), (64, 22), (50, 50), (1, 500), (31, 77)])
def test_a_mask_of_the_whole_image_is_1_everywhere_also_where_padding_cuts_a_cell(size):
    place = place_of(*size)
    low = mask_targets([np.ones(size, np.uint8)], [place], "low", CELLS).low
    torch.testing.assert_close(low, torch.ones_like(low))


def test_masks_of_several_images_are_padded_and_keep_their_order():
    rng = np.random.default_rng(0)
    sizes = [(30, 64), (30, 64), (64, 64), (64, 20), (30, 64)]
    masks, places = [random_mask(rng, size) for size in sizes], [place_of(*size) for size in sizes]
    low = mask_targets(masks, places, "low", CELLS)
    assert low.sizes == [(8, 16), (8, 16), (16, 16), (16, 5), (8, 16)] and low.low.shape == (5, 16, 16)
    for index, (rows, columns) in enumerate(low.sizes):
        alone = mask_targets(masks[index : index + 1], places[index : index + 1], "low", CELLS)
        assert torch.equal(low.low[index, :rows, :columns], alone.low[0])
        assert not low.low[index, rows:].any() and not low.low[index, :, columns:].any()
    whole = mask_targets(masks, places, "original", CELLS)
    assert [len(stack) for stack in whole.original] == [2, 1, 1, 1] and whole.sizes == sizes
    assert all((one.numpy() == mask).all() for one, mask in zip(sum(map(list, whole.original), []), masks, strict=True))
    assert all(stack.dtype == torch.uint8 for stack in whole.original)
    assert whole.geometry == [places[0], places[2], places[3], places[4]]


def test_no_masks_and_a_mask_of_another_size():
    assert mask_targets([], [], "low", CELLS).sizes == [] == mask_targets([], [], "original", CELLS).sizes
    with pytest.raises(ValueError, match=r"\(9, 9\).*\(8, 8\)"):
        mask_targets([np.zeros((9, 9), np.uint8)], [place_of(8, 8)], "low", CELLS)


def test_targets_cross_from_a_worker_and_to_a_device_in_one_block():
    mask = random_mask(np.random.default_rng(0), (30, 64))
    for resolution in ("low", "original"):
        targets = mask_targets([mask] * 2, [place_of(30, 64)] * 2, resolution, CELLS)
        there = SharedBatch(Packed(targets)).unpack().to("cpu").tree
        assert there.sizes == targets.sizes and there.geometry == targets.geometry
        if resolution == "low":
            assert torch.equal(there.low, targets.low) and torch.equal(there.cells, targets.cells)
        else:
            assert len(there.original) == 1 and torch.equal(there.original[0], targets.original[0])


def test_nearest_samples_cell_centres():
    image = np.arange(16).reshape(4, 4)
    assert nearest(image, (2, 2)).tolist() == [[5, 7], [13, 15]]
    assert (nearest(image, (8, 8)) == image.repeat(2, 0).repeat(2, 1)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_region_iou_equals_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    region_map, mask = random_map(rng), random_mask(rng, (24, 18))
    small = nearest(mask, region_map.labels.shape).astype(bool)
    got = region_iou(region_map, mask)
    for region in range(region_map.count):
        inside = region_map.labels == region
        union = (inside | small).sum()
        assert got[region] == pytest.approx((inside & small).sum() / max(union, 1), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_instance_of_region_equals_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    region_map = random_map(rng)
    labels = rng.integers(-1, 3, size=region_map.labels.shape).astype(np.int32)
    got = instance_of_region(region_map, labels)
    for region in range(region_map.count):
        inside = region_map.labels == region
        shares = [(labels[inside] == i).mean() for i in range(max(int(labels.max()) + 1, 1))]
        assert got[region] == (int(np.argmax(shares)) if max(shares) > 0.5 else -1)


def test_expressions_are_compared_with_their_own_image():
    rng = np.random.default_rng(0)
    sizes, grids = [(24, 18), (10, 20)], [(3, 2), (2, 5)]
    maps, image_index = [random_map(rng), RegionMap.whole_image((5, 10))], [0, 1, 0]
    masks, places = [random_mask(rng, sizes[i]) for i in image_index], [place_of(*size) for size in sizes]

    def targets(region_maps, losses=ALL):
        return auxiliary_targets(
            losses,
            masks=masks,
            image_index=image_index,
            geometry=places,
            grids=grids,
            region_maps=region_maps,
            instances=None,
            tokenizer=tokenizer,
        )

    by_superpixel, by_patch = targets(maps), targets(None)
    assert by_superpixel.shares is None and by_patch.iou is None and by_superpixel.words is None
    for row, (index, mask) in enumerate(zip(image_index, masks, strict=True)):
        iou = region_iou(maps[index], mask)
        np.testing.assert_array_equal(by_superpixel.iou[row, : len(iou)], iou)
        assert not by_superpixel.iou[row, len(iou) :].any()
        h, w = grids[index]
        torch.testing.assert_close(by_patch.shares[row, : h * w], patch_shares(mask, grids[index]))
        torch.testing.assert_close(by_patch.centres[row], mask_centre(mask, places[index]))
    nothing = targets(maps, ())
    assert all(getattr(nothing, name) is None for name in ("iou", "shares", "centres", "words", "place_ids"))


def test_words_are_padded_ids_of_words_inside_a_sentence():
    ids = word_token_ids(["cup", "a", "star"], tokenizer)
    assert ids.tolist() == [[99, 117, 112, NO_WORD], [97, *[NO_WORD] * 3], [115, 116, 97, 114]]
    places = auxiliary_targets(
        ["place_alignment"],
        masks=[],
        image_index=[],
        geometry=[],
        grids=[],
        region_maps=None,
        instances=None,
        tokenizer=tokenizer,
    )
    assert torch.equal(places.place_ids, word_token_ids(PLACE_WORDS, tokenizer))


@pytest.mark.parametrize("superpixels", [True, False])
def test_words_name_the_object_of_each_superpixel_or_patch(superpixels):
    rng = np.random.default_rng(0)
    grids = [(3, 2), (2, 2), (2, 5)]
    words = [[["red", "cup"], ["star"]], None, [["cup", "blue"]]]
    labels = [rng.integers(-1, 2, (24, 18)).astype(np.int32), None, np.zeros((10, 20), np.int32)]
    instances = [None if w is None else {"labels": one, "words": w} for w, one in zip(words, labels, strict=True)]
    maps = [random_map(rng), RegionMap.whole_image((5, 5)), RegionMap.whole_image((5, 10))]
    targets = word_targets(instances, grids, maps if superpixels else None, tokenizer)
    vocabulary = ["blue", "cup", "red", "star"]
    objects = [("red", "cup"), ("star",), ("cup", "blue"), ()]  # the last for what shows none
    assert targets.named.tolist() == [[float(word in names) for word in vocabulary] for names in objects]
    assert torch.equal(targets.ids, word_token_ids(vocabulary, tokenizer))
    assert targets.annotated.tolist() == [True, False, True]
    if superpixels:
        first = instance_of_region(maps[0], labels[0]).tolist()
        assert targets.owner[0, : len(first)].tolist() == first and targets.owner[2, 0] == 2
        assert (targets.owner[1:, 1:] == -1).all() and (targets.owner[1] == -1).all()
    else:
        assert targets.first.tolist() == [0, 2, 2] and targets.shares.shape == (3, 2, 10)
        torch.testing.assert_close(targets.shares[0, :, :6], object_shares(labels[0], (3, 2)))
        assert (targets.shares[2, 0] == 1).all() and not targets.shares[1].any()


def test_one_word_has_nothing_to_differ_from_and_an_object_without_words_is_refused():
    item = {"labels": np.zeros((4, 4), np.int32), "words": [["cup"]]}
    assert word_targets([item, None], [(2, 2)] * 2, None, tokenizer) is None
    nowhere = {"labels": np.full((4, 4), -1, np.int32), "words": [["cup", "red"]]}
    assert not word_targets([nowhere], [(2, 2)], None, tokenizer).shares.any()
    with pytest.raises(ValueError, match="object 1, but there are words for 1"):
        word_targets([{"labels": np.ones((4, 4), np.int32), "words": [["cup", "red"]]}], [(2, 2)], None, tokenizer)


NOUNS = NounFinder(["animal", "dog", "tea cup", "thing"])


def test_objects_are_named_by_the_nouns_of_a_table():
    """Each noun once, in the table's order; none for an object that the table does not name."""
    found = object_nouns([["dogs", "animal", "red", "dog"], ["blue", "thing"], ["tea cup"]], NOUNS)
    assert found.tolist() == [[0, 1], [-1, -1], [2, -1]] and found.dtype == torch.int64
    assert object_nouns([["red"]], NOUNS).tolist() == [[-1]]
    assert object_nouns([], NOUNS).tolist() == [[-1]]  # no object at all


def test_a_colour_names_an_object_only_as_its_category():
    finder = NounFinder(["circle", "fruit", "orange"])
    assert object_nouns([["circle", "orange", "plain"]], finder).tolist() == [[0]]
    assert object_nouns([["orange", "fruit", "orange"]], finder).tolist() == [[1, 2]]
    assert object_nouns([["fish", "orange"]], finder).tolist() == [[-1]]


@given(st.lists(st.lists(st.sampled_from(["animal", "dog", "tea cup", "red", "thing"]), max_size=4), max_size=4))
def test_object_nouns_equal_a_plain_lookup(objects):
    found = object_nouns(objects, NOUNS)
    for row, words in zip(found.tolist(), objects, strict=False):
        assert [one for one in row if one >= 0] == sorted(
            {NOUNS.nouns.index(w) for w in words if w not in ("red", "thing")}
        )


@pytest.mark.parametrize("finder", [None, NOUNS])
def test_nouns_are_looked_up_where_classes_are_drawn(finder):
    words = [[["dog", "animal"], ["star"]], None, [["dog", "blue"]]]
    labels = np.zeros((4, 4), np.int32)
    instances = [None if w is None else {"labels": labels, "words": w, "composed": True} for w in words]
    instances[2]["composed"] = False  # a photograph
    targets = auxiliary_targets(
        ["word_alignment"], masks=[], image_index=[], geometry=[], grids=[(2, 2)] * 3, region_maps=None,
        instances=instances, tokenizer=tokenizer, finder=finder,
    )  # fmt: skip
    if finder is None:
        assert targets.words.nouns is None
    else:
        assert targets.words.nouns.tolist() == [[0, 1], [-1, -1], [-1, -1]]  # in the order of ``named``
        assert len(targets.words.nouns) == len(targets.words.named) - 1
