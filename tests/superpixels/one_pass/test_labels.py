"""Nested label maps, their boundaries, and the records that keep them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lavis_svp.common.files import BadFileError
from lavis_svp.superpixels.generator import COARSEST
from lavis_svp.superpixels.one_pass.head import LEVELS
from lavis_svp.superpixels.one_pass.labels import (
    HeadRecord,
    boundary_targets,
    nearest_labels,
    nested_maps,
    read_record,
)


@st.composite
def some_masks(draw: st.DrawFn) -> tuple[list[np.ndarray], tuple[int, int]]:
    size = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return [rng.random(size) < rng.random() for _ in range(draw(st.integers(0, 25)))], size


def edges(labels: np.ndarray) -> np.ndarray:
    """Which pixel differs from its neighbour to the right, or from that below."""
    found = np.zeros(labels.shape, bool)
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            for other in ((row + 1, column), (row, column + 1)):
                if other[0] < labels.shape[0] and other[1] < labels.shape[1]:
                    found[row, column] |= labels[row, column] != labels[other]
    return found


@given(some_masks())
def test_maps_of_masks_are_those_of_a_slow_reference(drawn: tuple[list[np.ndarray], tuple[int, int]]) -> None:
    masks, size = drawn
    maps = nested_maps(masks, size)
    assert maps.shape == (LEVELS, *size) and maps.dtype == np.int32 and maps.min() == 0
    ordered = sorted(masks, key=lambda mask: -mask.sum())
    least = min(COARSEST, len(masks))
    for level, labels in enumerate(maps):
        used = ordered[: round(least + level / (LEVELS - 1) * (len(masks) - least))]
        names = {}
        for place in np.ndindex(size):
            names.setdefault(tuple(bool(mask[place]) for mask in used), set()).add(int(labels[place]))
        assert all(len(numbers) == 1 for numbers in names.values())  # the same masks: the same region
        assert len({number for numbers in names.values() for number in numbers}) == len(names)  # and no other
        assert set(np.unique(labels)) == set(range(len(names)))
        union = np.zeros(size, bool)
        for mask in used:
            union |= edges(mask)
        assert np.array_equal(edges(labels), union)


@given(some_masks())
def test_regions_of_a_level_are_unions_of_those_of_the_next(drawn: tuple[list[np.ndarray], tuple[int, int]]) -> None:
    maps = nested_maps(*drawn)
    for coarse, fine in zip(maps, maps[1:], strict=False):
        pairs = {(int(a), int(b)) for a, b in zip(fine.ravel(), coarse.ravel(), strict=True)}
        assert len(pairs) == len({fine_label for fine_label, _ in pairs})


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A mask is \(2, 3\), but the label maps are \(3, 3\)"):
        nested_maps([np.ones((2, 3), bool)], (3, 3))


def test_boundaries_of_cells_are_the_highest_of_their_pixels() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (2, 12, 8))
    fine = boundary_targets(torch.from_numpy(labels), (12, 8))
    assert np.array_equal(fine.numpy().astype(bool), np.stack([edges(one) for one in labels]))
    coarse = boundary_targets(torch.from_numpy(labels), (4, 2))
    assert torch.equal(coarse, fine.reshape(2, 4, 3, 2, 4).amax((2, 4)))


def test_a_coarse_map_is_enlarged_before_its_boundaries_are_taken() -> None:
    labels = torch.tensor([[[0, 1]]])
    assert boundary_targets(labels, (2, 4)).tolist() == [[[0, 1, 0, 0], [0, 1, 0, 0]]]
    assert nearest_labels(labels, (1, 4)).tolist() == [[[0, 0, 1, 1]]]


def test_one_region_has_no_boundary() -> None:
    assert not boundary_targets(torch.zeros(5, 1, 1, dtype=torch.int16), (1, 1)).any()


def record(sides: tuple[int, ...] = (64, 96)) -> HeadRecord:
    generator = torch.Generator().manual_seed(0)
    embeddings = {s: torch.randn(256, s // 16, s // 16, generator=generator).half() for s in sides}
    images = {s: torch.randint(256, (3, s // 4, s // 8), dtype=torch.uint8, generator=generator) for s in sides}
    return HeadRecord(torch.zeros(LEVELS, 16, 8, dtype=torch.int16), embeddings, images)


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    one = record()
    one.save(tmp_path / "a.safetensors")
    back = read_record(tmp_path / "a.safetensors", [96])
    assert torch.equal(back.labels, one.labels) and list(back.images) == [96]
    assert torch.equal(back.images[96], one.images[96]) and torch.equal(back.embeddings[96], one.embeddings[96])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", None, "has no labels"),
        ("labels", torch.zeros(LEVELS, 0, 4, dtype=torch.int16), "has no labels"),
        ("labels", torch.zeros(LEVELS, 4, 4), "has no labels"),
        ("embedding_64", torch.zeros(256, 4, 5).half(), "has no embedding_64"),
        ("embedding_64", torch.full((256, 4, 4), torch.nan).half(), "NaN or infinite"),
        ("image_64", torch.zeros(3, 17, 4, dtype=torch.uint8), "at most 16 cells"),
        ("image_64", torch.zeros(3, 4, 4), "has no image_64"),
    ],
)
def test_another_record_is_refused_in_a_line(tmp_path: Path, name: str, value: Tensor | None, message: str) -> None:
    one, file = record((64,)), tmp_path / "a.safetensors"
    tensors = {"labels": one.labels, "embedding_64": one.embeddings[64], "image_64": one.images[64], name: value}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(BadFileError, match=message) as raised:
        read_record(file, [64])
    assert "\n" not in str(raised.value) and "Delete it" in str(raised.value)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    record().save(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadFileError, match="do not match the checksum"):
        read_record(file, [64])
