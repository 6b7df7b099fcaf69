from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.resample import nearest
from lavis_svp.heads.grounding import (
    grid_iou,
    grounding_loss,
    instance_of_region,
    listwise_target,
    region_iou,
    word_alignment_loss,
)
from lavis_svp.superpixels import RegionMap


def random_map(rng):
    return RegionMap.from_labels(rng.integers(-1, 5, size=(12, 9)) if rng.random() < 0.9 else np.zeros((12, 9), int))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_region_iou_equals_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    region_map, mask = random_map(rng), (rng.random((24, 18)) > 0.5).astype(np.uint8)
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


def test_nearest_samples_cell_centres():
    image = np.arange(16).reshape(4, 4)
    assert nearest(image, (2, 2)).tolist() == [[5, 7], [13, 15]]
    assert (nearest(image, (8, 8)) == image.repeat(2, 0).repeat(2, 1)).all()


def test_grid_iou_of_whole_patches_is_plain_iou():
    assignment = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    share = torch.tensor([1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(grid_iou(assignment, share), torch.tensor([1 / 4, 2 / 3]))


def test_the_listwise_loss_equals_cross_entropy_and_skips_unreachable_targets():
    scores = torch.randn(3, 4).log_softmax(-1)
    target = torch.stack([listwise_target(torch.tensor(v)) for v in ([0, 0, 0.9, 0], [0, 0.5, 0, 0], [0.0] * 4)])
    expected = F.nll_loss(scores[:2], torch.tensor([2, 1]))
    torch.testing.assert_close(grounding_loss(scores, target), expected)
    masked = scores.clone()
    masked[:, 3] = torch.finfo(torch.float32).min  # padding: no inf * 0
    assert torch.isfinite(grounding_loss(masked, target))


def test_word_alignment_is_least_for_tokens_that_are_their_words():
    words = torch.eye(4)
    labels = torch.eye(4)
    scale, bias = torch.tensor(8.0), torch.tensor(-2.0)
    right = word_alignment_loss(words - words.mean(0), words, labels, torch.ones(4), scale, bias)
    wrong = word_alignment_loss((words - words.mean(0)).roll(1, 0), words, labels, torch.ones(4), scale, bias)
    assert right < wrong
