"""What a classifier alone finds, and how far regions and SAM reach, against brute force."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.probes.zero_shot import (
    FIGURES,
    MOST_JOINED,
    NEARLY,
    format_zero_shot,
    region_figures,
    sam_at_centre,
    zero_shot_rows,
    zero_shot_table,
)
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.geometry import mask_centre

READS = {
    "classifier": {"side": 64},
    "seg_prompt": {"pointer": True, "pointer_nouns": True},
    "prompt": {"style": "plain", "answers": ["[SEG]"]},
}


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.booleans())
def test_the_figures_equal_brute_force(seed, known):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, rng.integers(1, 6), (5, 6)).astype(np.int32)
    labels[0, 0] = 0
    regions = RegionMap.from_labels(labels)
    target = rng.random((5, 6)) < rng.uniform(0.2, 0.9)
    target[0, 0] = True
    masks = [regions.labels == region for region in range(regions.count)]
    scores = rng.random(regions.count) if known else None
    found = region_figures(regions, target.astype(np.uint8), scores)
    inside = [(mask & target).sum() / mask.sum() >= 0.5 for mask in masks]
    unions = [
        np.logical_or.reduce([masks[r] for r in chosen])
        for size in range(1, len(masks) + 1)
        for chosen in combinations(range(len(masks)), size)
    ]
    assert found["chance"] == pytest.approx(np.mean(inside))
    assert found["single"] == pytest.approx(max(iou(mask, target) for mask in masks), abs=1e-6)
    assert found["union"] == pytest.approx(max(iou(mask, target) for mask in unions), abs=1e-6)
    if scores is None:
        assert (found["pick"], found["iou"]) == (found["chance"], 0.0)
        return
    ranked = sorted(range(len(masks)), key=lambda region: -scores[region])
    joined = [region for region in ranked[:MOST_JOINED] if scores[region] >= NEARLY * max(scores)]
    assert found["pick"] == float(inside[ranked[0]])
    assert found["iou"] == pytest.approx(iou(np.logical_or.reduce([masks[r] for r in joined]), target))


def test_a_target_of_another_resolution_is_the_same_target():
    regions = RegionMap.from_labels(np.repeat(np.arange(4, dtype=np.int32), 2).reshape(2, 4))
    target = np.zeros((4, 8), np.uint8)
    target[:2, :4] = 1  # the first region
    found = region_figures(regions, target, np.array([0.9, 0.1, 0.2, 0.3]))
    assert found == {"chance": 0.25, "pick": 1.0, "iou": 1.0, "single": 1.0, "union": 1.0}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(**READS).eval()


class SetDecoder:
    """Gives three masks and how good they are, and keeps what it was asked."""

    def __init__(self, logits, quality):
        self.logits, self.quality, self.asked = logits, quality, {}

    def __call__(self, **asked):
        self.asked = asked
        return self.logits, self.quality


def test_of_sams_three_masks_the_one_counts_that_it_rates_best(model, batch):
    encoded = model.encode(batch)
    target = batch["masks"][1][0]  # of the square image of 128 pixels, SAM's side
    exact = torch.from_numpy(target).float().mul(8).sub(4)[::4, ::4]  # (32, 32)
    logits = torch.stack([-torch.ones_like(exact), exact, torch.ones_like(exact)])[None]
    extractor = SimpleNamespace(sam_prompt_encoder=model.extractor.sam_prompt_encoder)
    scores = {}
    for best in range(3):
        extractor.sam_mask_decoder = SetDecoder(logits, torch.eye(3)[best : best + 1])
        scores[best] = sam_at_centre(SimpleNamespace(extractor=extractor), encoded, 1, target)
    assert scores[0] == 0 and scores[1] > 0.8 and scores[2] == pytest.approx(target.mean(), abs=1e-3)
    asked = extractor.sam_mask_decoder.asked
    centre = mask_centre(target, encoded.vision.geometry[1]) * 128
    expected, _ = model.extractor.sam_prompt_encoder(
        points=(centre[None, None], torch.ones(1, 1, dtype=torch.int)), boxes=None, masks=None
    )
    torch.testing.assert_close(asked["sparse_prompt_embeddings"], expected)
    assert torch.equal(asked["image_embeddings"][0], encoded.vision.sam[1])


def test_sams_answer_does_not_depend_on_batch_mates(model, batch):
    together = sam_at_centre(model, model.encode(batch), 1, batch["masks"][1][0])
    one = {"image": batch["image"][1:], "original_size": batch["original_size"][1:]}
    assert 0 <= together <= 1
    assert sam_at_centre(model, model.encode(one), 0, batch["masks"][1][0]) == pytest.approx(together, abs=1e-3)


def test_a_row_for_each_expression_and_means_by_group(model, batch):
    samples = {
        **batch,
        "kinds": [["attribute", "no_target", "relation"], ["attribute"]],
        "tags": [[{"scene": "many"}, {}, {"scene": "one"}], [{"scene": "one"}]],
    }
    rows = zero_shot_rows(SimpleNamespace(model=model, held_out=lambda: iter([samples])))
    assert [row["expression"] for row in rows] == sum(batch["text_input"], [])
    cup, cat, star, circle = rows
    assert cup["known"] == 1 and 0 < cup["evidence"] < 1 and cup["area_share"] == pytest.approx(1200 / (96 * 128))
    assert "chance" not in cat and cat["evidence"] is not None  # without a target
    assert circle["known"] == 0 and circle["evidence"] is None and circle["pick"] == circle["chance"]
    table = zero_shot_table(rows)
    assert list(table) == ["all", "kind attribute", "kind relation", "scene many", "scene one"]
    assert [group["count"] for group in table.values()] == [3, 2, 1, 1, 2]
    for key in FIGURES:
        assert table["all"][key] == pytest.approx(np.mean([cup[key], star[key], circle[key]]))
        assert table["scene one"][key] == pytest.approx((star[key] + circle[key]) / 2)
    lines = format_zero_shot(table).splitlines()
    assert len(lines) == 6 and lines[1].split()[:2] == ["all", "3"] and f"{table['all']['union']:.3f}" in lines[1]
    assert zero_shot_table([cat]) == {}


def test_a_model_without_a_classifier_or_superpixels_is_refused(make_model, batch):
    with pytest.raises(ValueError, match="tiny_photos"):
        zero_shot_rows(SimpleNamespace(model=make_model(), held_out=lambda: iter([])))
    patches = make_model(**READS, projector={"name": "mlp"}).eval()
    with pytest.raises(ValueError, match="superpixels"):
        zero_shot_rows(SimpleNamespace(model=patches, held_out=lambda: iter([batch])))
