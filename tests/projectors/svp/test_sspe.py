"""SSPE: place, extent and shape can be read from what it makes; test_reference.py shows that it is exact."""

import pytest
import torch

from lavis_svp.projectors.svp.sspe import SSPE

KINDS = ("ellipse", "rectangle", "triangle")


def test_empty_and_vanishing_masks_stay_finite():
    sspe = SSPE(8, width=16)
    masks = torch.zeros(1, 2, 7, 3)
    masks[0, 1, 4, 2] = 1e-30
    masks.requires_grad_()
    out = sspe(masks)
    out.square().sum().backward()
    assert out.isfinite().all() and masks.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in sspe.parameters())


def test_same_place_at_another_mask_size_means_the_same():
    torch.manual_seed(0)
    sspe = SSPE(8, width=64)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:8, 2:10] = 1
    finer = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
    elsewhere = mask.roll(6, dims=3)
    assert (sspe(mask) - sspe(finer)).norm() < 0.1 * (sspe(mask) - sspe(elsewhere)).norm()


def test_computes_in_float32_under_autocast():
    sspe = SSPE(8, width=16)
    masks = torch.rand(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = sspe(masks)
    assert out.dtype == torch.float32 and torch.equal(out, sspe(masks))


@pytest.mark.parametrize("bad", [{"width": 30}, {"heads": 5}], ids=str)
def test_refuses_what_it_cannot_build(bad):
    with pytest.raises(ValueError):
        SSPE(8, **{"width": 16, **bad})


def random_shapes(count, size, generator, finer=4):
    """Soft masks (count, size, size) of ellipses, rectangles and triangles; centre and extent (x, y, w, h); kind."""
    y, x = torch.meshgrid(*[(torch.arange(size * finer) + 0.5) / (size * finer)] * 2, indexing="ij")
    extent = 0.12 + 0.5 * torch.rand(count, 2, generator=generator)
    centre = extent / 2 + (1 - extent) * torch.rand(count, 2, generator=generator)
    kind = torch.arange(count) % len(KINDS)
    masks = torch.empty(count, size, size)
    for i in range(count):
        u, v = (x - centre[i, 0]) / extent[i, 0] * 2, (y - centre[i, 1]) / extent[i, 1] * 2  # box = [-1, 1] x [-1, 1]
        if KINDS[kind[i]] == "ellipse":
            inside = u * u + v * v <= 1
        elif KINDS[kind[i]] == "rectangle":
            inside = (u.abs() <= 1) & (v.abs() <= 1)
        else:
            inside = (v.abs() <= 1) & (u.abs() <= (v + 1) / 2)
        masks[i] = inside.float().view(size, finer, size, finer).mean(dim=(1, 3))
    return masks, torch.cat([centre, extent], dim=1), kind


def ridge(features, targets, train, strength=1e-3):
    """Predictions of a linear ridge probe fitted to the first ``train`` rows, for the others."""
    mean, std = features[:train].mean(0), features[:train].std(0) + 1e-6
    design = torch.cat([(features - mean) / std, torch.ones(len(features), 1)], dim=1).double()
    gram = design[:train].T @ design[:train] + strength * train * torch.eye(design.shape[1], dtype=torch.float64)
    return design[train:] @ torch.linalg.solve(gram, design[:train].T @ targets[:train].double())


def probe(sspe, size, count=1200, train=900, seed=0):
    """R2 of x, y, w, h and of log aspect, and accuracy of the kind, read linearly from SSPE on unseen masks."""
    masks, boxes, kind = random_shapes(count, size, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features = sspe(masks[None])[0]
    aspect = (boxes[:, 2] / boxes[:, 3]).log()[:, None]
    targets = torch.cat([boxes, aspect, torch.nn.functional.one_hot(kind).float()], dim=1)
    predicted = ridge(features, targets, train)
    real = targets[train:].double()
    r2 = 1 - (real - predicted).square().mean(0) / real.var(0, unbiased=False)
    accuracy = (predicted[:, 5:].argmax(1) == kind[train:]).double().mean().item()
    return {name: round(r2[i].item(), 3) for i, name in enumerate(["x", "y", "w", "h", "aspect"])} | {"kind": accuracy}


@pytest.mark.parametrize("size", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_place_extent_and_shape_can_be_read_from_untrained_sspe(size):
    torch.manual_seed(0)
    scores = probe(SSPE(192), size)
    print(size, scores)
    assert min(scores["x"], scores["y"]) > 0.95
    assert min(scores["w"], scores["h"], scores["aspect"]) > 0.85
    assert scores["kind"] > 0.6  # chance is 1/3; a bounding box does not tell the kinds apart


@pytest.mark.slow
def test_shape_is_learned_in_a_few_steps():
    torch.manual_seed(0)
    masks, _, kind = random_shapes(2000, 16, torch.Generator().manual_seed(1))
    sspe = SSPE(len(KINDS), width=64)
    optimiser = torch.optim.AdamW(sspe.parameters(), lr=2e-3)
    for _ in range(250):
        picked = torch.randint(0, 1500, (64,))
        loss = torch.nn.functional.cross_entropy(sspe(masks[None, picked])[0], kind[picked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        accuracy = (sspe(masks[None, 1500:])[0].argmax(1) == kind[1500:]).float().mean().item()
    print(accuracy)
    assert accuracy > 0.9
