from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.images import nearest
from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.auxiliary_losses import (
    PLACE_SCALE,
    PLACE_WORDS,
    grid_iou,
    grounding_loss,
    instance_of_region,
    listwise_target,
    region_iou,
    token_places,
    word_alignment_loss,
    word_embeddings,
)
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.feature_extractor import VisionFeatures
from lavis_svp.vision.geometry import SamInputGeometry
from lavis_svp.vision.types import PatchFeatures

SVP = {"name": "svp", "sspe_width": 16, "mask_size": 8}
ON = {"auxiliary_losses": {"place_alignment": 1.0}}
FIRST = {"epoch": 0, "num_iters_per_epoch": 2, "iters": 0}


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


# place alignment


def inputs(grid, extent, assignment):
    count = grid[0] * grid[1]
    features = PatchFeatures(torch.zeros(1, count, 3), [grid], torch.ones(1, count, dtype=torch.bool))
    geometry = SamInputGeometry(64, (64, 64), (80, 80))
    vision = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [geometry], [extent])
    tokens = assignment.shape[0]
    return vision, VisualTokens(torch.zeros(1, tokens, 4), torch.ones(1, tokens, dtype=torch.bool), assignment[None])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_a_tokens_place_is_the_mean_of_its_patches_centres(rows, columns, tokens, seed):
    torch.manual_seed(seed)
    assignment = torch.rand(tokens, rows * columns)
    assignment = assignment / assignment.sum(1, keepdim=True)
    places = token_places(*inputs((rows, columns), (1.0, 1.0), assignment))
    for token in range(tokens):
        y = sum(float(assignment[token, n]) * (n // columns + 0.5) / rows for n in range(rows * columns))
        x = sum(float(assignment[token, n]) * (n % columns + 0.5) / columns for n in range(rows * columns))
        torch.testing.assert_close(places[0, token], torch.tensor([y, x]), atol=1e-3, rtol=0)


def test_a_place_is_a_share_of_the_image_and_not_of_its_padding():
    assignment = torch.zeros(1, 16)
    assignment[0, 5] = 1.0  # second row and column of 4 x 4, of which the image fills the upper half
    places = token_places(*inputs((4, 4), (0.5, 1.0), assignment))
    torch.testing.assert_close(places[0, 0], torch.tensor([0.75, 0.375]))


def test_it_is_off_by_default_and_in_evaluation(make_model, batch):
    model = make_model()
    assert "loss_place" not in model(batch)
    model = make_model(**ON)
    assert model(batch)["loss_place"] > 0
    assert "loss_place" not in model.eval()(batch)


@pytest.mark.parametrize("name", ["svp", "mask_pool", "avg_pool", "mlp"])
def test_the_loss_is_the_formula_token_by_token(make_model, batch, name):
    model = make_model(**ON, projector=SVP if name == "svp" else {"name": name})
    encoded = model.encode(batch)
    visual, places = encoded.visual, token_places(encoded.vision, encoded.visual)
    words = word_embeddings(model.language, list(PLACE_WORDS), model.device)
    words = torch.nn.functional.normalize(words - words.mean(0), dim=1)
    terms = []
    for image, valid in enumerate(visual.valid):
        for token in valid.nonzero().flatten().tolist():
            y, x = places[image, token].tolist()
            unit = torch.nn.functional.normalize(visual.tokens[image, token], dim=0)
            share = {"left": 1 - x, "right": x, "above": 1 - y, "below": y, "top": 1 - y, "bottom": y}
            for index, word in enumerate(PLACE_WORDS):
                p = torch.sigmoid(PLACE_SCALE * unit @ words[index])
                terms.append(-share[word] * p.log() - (1 - share[word]) * (1 - p).log())
    losses = model.auxiliary_losses.token_losses(encoded.vision, visual, None, model.language)
    torch.testing.assert_close(losses["loss_place"], torch.stack(terms).mean())


def test_tokens_that_say_their_side_lose_less_than_those_that_say_the_other():
    words = torch.eye(6, 12)
    x = torch.linspace(0, 1, 9)
    labels = torch.stack([1 - x, x, *[torch.full_like(x, 0.5)] * 4], dim=1)  # (M, words)
    tokens = torch.ones(9, 12)
    tokens[:, 0], tokens[:, 1] = 2 * (0.5 - x), 2 * (x - 0.5)
    scale, none = torch.tensor([PLACE_SCALE]), torch.zeros(1)
    right = word_alignment_loss(tokens, words, labels, torch.ones(9), scale, none)
    wrong = word_alignment_loss(tokens, words, labels.flip(0), torch.ones(9), scale, none)
    assert right < wrong - 0.05


def test_words_do_not_move_towards_tokens(make_model, batch):
    model = make_model(
        auxiliary_losses={"place_alignment": 1.0, "word_alignment": 1.0, "alignment_steps": 2},
        language={"train_embeddings": "all"},
    )
    model({**batch, **FIRST})["loss"].backward()
    moved = [name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()]
    assert moved and not [name for name in moved if "embed_tokens" in name]


def test_the_alignment_stage_trains_places_too_and_alone_where_nothing_is_named(make_model, batch):
    model = make_model(auxiliary_losses={"place_alignment": 1.0, "word_alignment": 1.0, "alignment_steps": 2})
    losses = model({**batch, **FIRST})
    assert set(losses) == {"loss", "loss_word", "loss_place", "stats"}
    losses["loss"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.language.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    losses = model({**batch, "instances": None, **FIRST})
    assert losses["loss_word"] == 0 and losses["loss_place"] > 0


def test_a_projector_that_hides_its_patches_is_an_error():
    vision, visual = inputs((2, 2), (1.0, 1.0), torch.eye(4))
    visual.assignment = None
    with pytest.raises(ValueError, match="place_alignment"):
        token_places(vision, visual)
