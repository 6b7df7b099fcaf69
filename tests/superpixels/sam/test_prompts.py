"""The prompt grid and its second pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.modeling import PromptEncoder

from lavis_svp.superpixels.sam.prompts import first_pass, grid_points, point_tokens, uncovered_points


def test_grid_points_lie_in_cell_centres_of_the_valid_area() -> None:
    points = grid_points((60, 128), 2)
    assert points.tolist() == [[32, 15], [96, 15], [32, 45], [96, 45]]
    slim = grid_points((7, 1024), 32)
    assert slim.shape == (1024, 2) and (slim > 0).all() and (slim < torch.tensor([1024, 7])).all()


@torch.no_grad()
def test_point_tokens_are_bit_for_bit_those_of_segment_anything() -> None:
    torch.manual_seed(0)
    encoder = PromptEncoder(64, (8, 8), (128, 128), mask_in_chans=8).eval()
    points = grid_points((90, 128), 7)
    expected, _ = encoder(points=(points[:, None], torch.ones(len(points), 1)), boxes=None, masks=None)
    assert torch.equal(point_tokens(encoder, points), expected)


@pytest.mark.parametrize(
    ("side", "stride", "count"), [(32, 2, 16), (32, 4, 8), (32, 1, 32), (5, 2, 2), (1, 2, 1), (2, 8, 1)]
)
def test_the_first_pass_is_an_even_part_of_the_grid(side: int, stride: int, count: int) -> None:
    numbers = first_pass(side, stride)
    assert len(set(numbers.tolist())) == count**2 and numbers.max() < side**2
    rows, columns = np.divmod(numbers, side)
    assert len(np.unique(rows)) == len(np.unique(columns)) == count
    assert len(np.unique(np.diff(np.unique(rows)))) <= 1


def test_only_points_on_uncovered_pixels_wait_for_the_second_pass() -> None:
    covered = np.zeros((8, 12), bool)
    covered[:, :6] = True
    assert uncovered_points(covered, 4, np.array([2])).tolist() == [3, 6, 7, 10, 11, 14, 15]
    assert uncovered_points(np.ones((8, 12), bool), 4, np.array([], int)).tolist() == []
    slim = uncovered_points(np.zeros((1, 12), bool), 4, np.arange(15))  # fewer pixels than points
    assert slim.tolist() == [15]
