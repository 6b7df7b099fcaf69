from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lavis_svp.segmentation.losses import LossOptions, MaskLosses, mask_bce, mask_dice
from lavis_svp.segmentation.targets import MaskTargets, mask_targets
from lavis_svp.vision.geometry import SamInputGeometry, logits_to_original


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


@pytest.fixture
def places():
    sizes = [((64, 64), (80, 80)), ((30, 64), (38, 80)), ((30, 64), (38, 80)), ((64, 64), (80, 80))]
    return [SamInputGeometry(64, inside, original) for inside, original in sizes]


@pytest.fixture
def masks(places):
    return [(np.random.default_rng(i).random(one.original_size) > 0.5).astype(np.uint8) for i, one in enumerate(places)]


@pytest.mark.parametrize("resolution", ["original", "low"])
def test_the_batch_mean_is_over_masks_and_leaves_the_padding_out(resolution, places, masks):
    torch.manual_seed(0)
    logits = torch.randn(4, 16, 16)
    losses = MaskLosses()
    targets = mask_targets(masks, places, resolution, (16, 16))
    each = [
        losses(logits[i : i + 1], mask_targets(masks[i : i + 1], places[i : i + 1], resolution, (16, 16)))
        for i in range(4)
    ]
    both = losses(logits, targets)
    for name in ("loss_bce", "loss_dice"):
        torch.testing.assert_close(both[name], torch.stack([one[name] for one in each]).mean())
    logits[1, 8:] += 100.0  # below the image: padding
    if resolution == "low":
        assert torch.equal(losses(logits, targets)["loss_bce"], both["loss_bce"])


@pytest.mark.parametrize("resolution", ["original", "low"])
def test_the_losses_are_the_formulas_mask_by_mask(resolution, places, masks):
    torch.manual_seed(0)
    logits = torch.randn(4, 16, 16)
    targets = mask_targets(masks, places, resolution, (16, 16))
    bce, dice = [], []
    for index, (mask, place) in enumerate(zip(masks, places, strict=True)):
        if resolution == "original":
            scores, truth = logits_to_original(logits[index : index + 1], place)[0], torch.from_numpy(mask).float()
        else:
            rows, columns = targets.sizes[index]
            scores, truth = logits[index, :rows, :columns], targets.low[index, :rows, :columns]
        p = scores.double().sigmoid()
        bce.append(-(truth * p.log() + (1 - truth) * (1 - p).log()).mean())
        shared, total = (p * truth).sum() / 1000, (p.sum() + truth.sum()) / 1000
        dice.append(1 - (2 * shared + 1e-6) / (total + 1e-6))
    got = MaskLosses()(logits, targets)
    assert float(got["loss_bce"]) == pytest.approx(float(torch.stack(bce).mean()), rel=1e-5)
    assert float(got["loss_dice"]) == pytest.approx(float(torch.stack(dice).mean()), rel=1e-5)


@pytest.mark.parametrize("resolution", ["original", "low"])
def test_a_mask_that_fits_loses_nothing_also_where_padding_cuts_a_cell(resolution):
    """30 of 64 rows cut the eighth of 16 rows of cells in the middle."""
    place = SamInputGeometry(64, (30, 64), (30, 64))
    sure = torch.full((1, 16, 16), 30.0)
    targets = mask_targets([np.ones((30, 64), np.uint8)], [place], resolution, (16, 16))
    assert float(MaskLosses()(sure, targets)["loss_bce"]) < 1e-6


@pytest.mark.parametrize("resolution", ["original", "low"])
def test_losses_are_float32_under_autocast(resolution, places, masks):
    torch.manual_seed(0)
    logits = torch.randn(4, 16, 16)
    targets = mask_targets(masks, places, resolution, (16, 16))
    expected = MaskLosses()(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = mask_targets(masks, places, resolution, (16, 16))
        got = MaskLosses()(logits, again)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0)


def test_without_masks_every_logit_still_gets_a_gradient():
    logits = torch.randn(1, 16, 16, requires_grad=True)
    losses = MaskLosses()(logits, MaskTargets([]))
    assert float(losses["loss_bce"].detach()) == float(losses["loss_dice"].detach()) == 0
    losses["loss_bce"].backward()
    assert logits.grad is not None and not logits.grad.any()


def test_unequal_shapes_and_unknown_resolutions_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        mask_bce(torch.zeros(2, 2), torch.zeros(3, 3))
    place = SamInputGeometry(64, (64, 64), (8, 8))
    with pytest.raises(ValueError, match="2 masks' logits, but 1 targets"):
        MaskLosses()(torch.zeros(2, 16, 16), mask_targets([np.ones((8, 8), np.uint8)], [place], "low", (16, 16)))
    with pytest.raises(ValueError, match="original, low"):
        LossOptions(resolution="half")
