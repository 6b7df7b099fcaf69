"""Place alignment: tokens agree with the words for where they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.heads.grounding import word_alignment_loss
from lavis_svp.heads.mask_head import Frame
from lavis_svp.models.aids import PLACE_SCALE, PLACE_WORDS, word_embeddings
from lavis_svp.models.frozen import VisionFeatures
from lavis_svp.models.tokens import token_places
from lavis_svp.projectors.structures import PatchFeatures, VisualTokens

SVP = {"name": "svp", "sspe_width": 16, "mask_size": 8}
ON = {"aids": {"place_alignment": 1.0}}
FIRST = {"epoch": 0, "num_iters_per_epoch": 2, "iters": 0}


def inputs(grid, extent, assignment):
    count = grid[0] * grid[1]
    features = PatchFeatures(torch.zeros(1, count, 3), [grid], torch.ones(1, count, dtype=torch.bool))
    frozen = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [Frame(64, (64, 64), (80, 80))], [extent])
    tokens = assignment.shape[0]
    return VisualTokens(torch.zeros(1, tokens, 4), torch.ones(1, tokens, dtype=torch.bool), assignment[None]), frozen


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
    assert model.aids.place_loss(model.encode(batch), model.language) is None
    assert "loss_place" not in model(batch)
    model = make_model(**ON)
    assert model(batch)["loss_place"] > 0
    model.eval()
    assert model.aids.place_loss(model.encode(batch), model.language) is None


@pytest.mark.parametrize("name", ["svp", "mask_pool", "avg_pool", "mlp"])
def test_the_loss_is_the_formula_token_by_token(make_model, batch, name):
    model = make_model(**ON, projector=SVP if name == "svp" else {"name": name})
    encoded = model.encode(batch)
    visual, places = encoded.visual, token_places(encoded.visual, encoded.frozen)
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
    torch.testing.assert_close(model.aids.place_loss(encoded, model.language), torch.stack(terms).mean())


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


def test_a_token_of_the_whole_image_has_no_place(make_model, batch):
    model = make_model(**ON, projector={**SVP, "global_token": "mean"})
    encoded = model.encode(batch)
    before = model.aids.place_loss(encoded, model.language)
    encoded.visual.tokens = encoded.visual.tokens.detach().clone()
    encoded.visual.tokens[:, 0] += torch.randn(encoded.visual.tokens.shape[-1])
    torch.testing.assert_close(model.aids.place_loss(encoded, model.language), before)
    encoded.visual.tokens[:, 1] += torch.randn(encoded.visual.tokens.shape[-1])
    assert (model.aids.place_loss(encoded, model.language) - before).abs() > 1e-5


def test_words_do_not_move_towards_tokens(make_model, batch):
    model = make_model(
        aids={"place_alignment": 1.0, "word_alignment": 1.0, "alignment_steps": 2}, language={"train_embeddings": "all"}
    )
    model({**batch, **FIRST})["loss"].backward()
    moved = [name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()]
    assert moved and not [name for name in moved if "embed_tokens" in name]


def test_the_alignment_stage_trains_places_too_and_alone_where_nothing_is_named(make_model, batch):
    model = make_model(aids={"place_alignment": 1.0, "word_alignment": 1.0, "alignment_steps": 2})
    losses = model({**batch, **FIRST})
    assert set(losses) == {"loss", "loss_word", "loss_place", "stats"}
    losses["loss"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.language.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    losses = model({**batch, "instances": None, **FIRST})
    assert losses["loss_word"] == 0 and losses["loss_place"] > 0


def test_a_projector_that_hides_its_patches_is_an_error():
    visual, frozen = inputs((2, 2), (1.0, 1.0), torch.eye(4))
    visual.assignment = None
    with pytest.raises(ValueError, match="place_alignment"):
        token_places(visual, frozen)
