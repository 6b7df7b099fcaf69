"""Masks of whole regions, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lavis_svp.segmentation.region_mask import region_labels, region_logits, region_loss
from lavis_svp.segmentation.targets import region_inside
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.vision.geometry import SamInputGeometry


def test_scores_go_to_the_cells_of_their_regions():
    torch.manual_seed(0)
    scores = torch.randn(2, 4)
    order = torch.tensor(
        [[2, 0, 1, -1], [0, -1, -1, -1]]
    )  # the fourth token, and three of the second image, are padding
    labels = torch.randint(-1, 3, (2, 5, 6), dtype=torch.int32)
    labels[1][labels[1] > 0] = -1  # that image has one region
    found = region_logits(scores, order, labels)
    for k, y, x in np.ndindex(2, 5, 6):
        region = int(labels[k, y, x])
        expected = 0.0 if region < 0 else float(scores[k, order[k].tolist().index(region)])
        assert float(found[k, y, x]) == pytest.approx(expected)


def test_labels_cover_the_image_alone():
    labels = np.zeros((6, 12), np.int32)
    labels[:, 6:] = 1
    geometry = SamInputGeometry(64, (32, 64), (60, 120))
    found = region_labels([RegionMap.from_labels(labels)], [geometry], (16, 16))[0]
    assert (found[:8, :8] == 0).all() and (found[:8, 8:] == 1).all() and (found[8:] == -1).all()


def test_the_loss_is_least_where_the_scores_are_right_and_padding_does_not_count():
    inside, areas = torch.tensor([[1.0, 0.0, 0.3]]), torch.tensor([[0.2, 0.5, 0.0]])
    right, wrong = torch.tensor([[9.0, -9.0, 0.0]]), torch.tensor([[-9.0, 9.0, 0.0]])
    assert region_loss(right, inside, areas) < 0.01 < 2 < region_loss(wrong, inside, areas)
    assert region_loss(right + torch.tensor([[0, 0, 5.0]]), inside, areas) == region_loss(right, inside, areas)
    assert region_loss(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_the_share_of_a_region_inside_a_mask():
    labels = np.array([[0, 0, 1, 1], [0, 0, 1, -1]], np.int32)
    mask = np.array([[1, 0, 1, 1], [0, 0, 1, 1]], np.uint8)
    assert region_inside(RegionMap.from_labels(labels), mask) == pytest.approx([0.25, 1.0])
