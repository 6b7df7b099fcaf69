from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lavis_svp.segmentation.losses import LossOptions, MaskLosses, mask_bce, mask_dice
from lavis_svp.vision.geometry import SamInputGeometry


def test_bce_and_dice_equal_values_worked_out_by_hand():
    logits = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    p = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0.5]
    g = [1, 1, 0, 0]
    bce = -sum(y * math.log(q) + (1 - y) * math.log(1 - q) for q, y in zip(p, g, strict=True)) / 4
    assert float(mask_bce(logits, target)) == pytest.approx(bce, rel=1e-6)
    inter, total = sum(q * y for q, y in zip(p, g, strict=True)) / 1000, (sum(p) + sum(g)) / 1000
    assert float(mask_dice(logits, target)) == pytest.approx(1 - (2 * inter + 1e-6) / (total + 1e-6), rel=1e-5)


def test_the_extremes_of_dice():
    target = torch.zeros(50, 50)
    target[:25] = 1
    sure = (target * 2 - 1) * 50
    assert float(mask_dice(sure, target)) == pytest.approx(0, abs=1e-5)
    assert float(mask_dice(-sure, target)) == pytest.approx(1, abs=1e-3)
    assert float(mask_dice(torch.full((50, 50), -50.0), torch.zeros(50, 50))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("resolution", ["original", "low"])
def test_the_batch_mean_is_over_masks_and_leaves_the_padding_out(resolution):
    torch.manual_seed(0)
    geometry = [SamInputGeometry(64, (64, 64), (80, 80)), SamInputGeometry(64, (32, 64), (40, 80))]
    masks = [
        (np.random.default_rng(i).random(one.original_size) > 0.5).astype(np.uint8) for i, one in enumerate(geometry)
    ]
    logits = torch.randn(2, 16, 16)
    losses = MaskLosses(resolution)
    each = [losses(logits[i : i + 1], masks[i : i + 1], geometry[i : i + 1]) for i in range(2)]
    both = losses(logits, masks, geometry)
    for name in ("loss_bce", "loss_dice"):
        torch.testing.assert_close(both[name], (each[0][name] + each[1][name]) / 2)
    logits[1, 8:] += 100.0  # below the image: padding
    if resolution == "low":
        assert torch.equal(losses(logits, masks, geometry)["loss_bce"], both["loss_bce"])


def test_unequal_shapes_and_unknown_resolutions_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        mask_bce(torch.zeros(2, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="original, low"):
        LossOptions(resolution="half")
