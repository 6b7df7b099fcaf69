from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.auxiliary_losses import (
    NO_INSTANCE_WEIGHT,
    PLACE_SCALE,
    AuxiliaryLosses,
    AuxiliaryLossOptions,
    grid_iou,
    grounding_loss,
    listwise_target,
    token_instances,
    token_ious,
    token_owners,
    token_places,
    word_alignment_loss,
    word_embeddings,
)
from lavis_svp.segmentation.targets import (
    PLACE_WORDS,
    auxiliary_targets,
    instance_of_region,
    patch_shares,
    region_iou,
    word_targets,
)
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.feature_extractor import VisionFeatures
from lavis_svp.vision.geometry import SamInputGeometry
from lavis_svp.vision.types import PatchFeatures

SVP = {"name": "svp", "sspe_width": 16, "mask_size": 8}
ON = {"auxiliary_losses": {"place_alignment": 1.0}}
FIRST = {"epoch": 0, "num_iters_per_epoch": 2, "iters": 0}


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


@pytest.mark.parametrize("absents", [0, 1, 3])
def test_choosing_no_such_thing_counts_like_a_target(absents):
    """Both sorts in one cross-entropy over T + 1 choices, each expression with the same weight."""
    torch.manual_seed(absents)
    choices = torch.randn(3 + absents, 5).log_softmax(-1)  # the last is "no such thing"
    right = torch.tensor([2, 1, 0, *[4] * absents])
    target = F.one_hot(right[:3], 4).float()
    found = grounding_loss(choices[:3, :-1], target, choices[3:, -1])
    torch.testing.assert_close(found, F.nll_loss(choices, right))
    target[1] = 0  # no token overlaps it
    kept = torch.tensor([0, *range(2, 3 + absents)])
    torch.testing.assert_close(
        grounding_loss(choices[:3, :-1], target, choices[3:, -1]), F.nll_loss(choices[kept], right[kept])
    )
    unreachable = torch.full((absents,), -torch.inf)
    assert torch.isfinite(grounding_loss(choices[:3, :-1], target, unreachable))


def test_word_alignment_is_least_for_tokens_that_are_their_words():
    words = torch.eye(4)
    labels = torch.eye(4)
    scale, bias = torch.tensor(8.0), torch.tensor(-2.0)
    right = word_alignment_loss(words - words.mean(0), words, labels, torch.ones(4), scale, bias)
    wrong = word_alignment_loss((words - words.mean(0)).roll(1, 0), words, labels, torch.ones(4), scale, bias)
    assert right < wrong


# what a token covers

SIZES, GRIDS = [(24, 18), (10, 20), (16, 16)], [(3, 2), (2, 5), (1, 1)]


def letters(texts, add_special_tokens):
    return {"input_ids": [[ord(letter) for letter in text.strip()] for text in texts]}


def tokens_of_images(superpixels, seed):
    """Three images' tokens, shuffled; the last image has no superpixels, and one token for all of it."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    blocks = rng.integers(-1, 5, (4, 3)).repeat(3, 0).repeat(3, 1)  # (12, 9)
    maps = [RegionMap.from_labels(blocks), RegionMap.from_labels(rng.integers(0, 3, (5, 10)))]
    maps.append(RegionMap.whole_image((4, 4)))
    counts = [maps[0].count, maps[1].count, 1] if superpixels else [4, 3, 1]
    total = max(counts) + 1
    valid = torch.arange(total) < torch.tensor(counts)[:, None]
    order = torch.where(valid, torch.arange(total), -1)
    order[2] = -1
    assignment = torch.rand(3, total, 12) * valid[..., None]  # 12 patches, of which the grids have 6, 10 and 1
    for index, (h, w) in enumerate(GRIDS):
        assignment[index, :, h * w :] = 0
    assignment = assignment / assignment.sum(-1, keepdim=True).clamp_min(1e-9)
    visual = VisualTokens(
        torch.randn(3, total, 8) * valid[..., None], valid, assignment, order if superpixels else None
    )
    return rng, maps, visual.shuffled()


def slow_iou(visual, maps, index, mask):
    """One token after another, as release 0.1 did it."""
    out = []
    for token, real in enumerate(visual.valid[index].tolist()):
        if not real:
            out.append(0.0)
        elif visual.order is not None:
            region = int(visual.order[index, token])
            out.append(float(region_iou(maps[index], mask)[region]) if region >= 0 else 0.0)
        else:
            share = patch_shares(mask, GRIDS[index])
            out.append(float(grid_iou(visual.assignment[index, token : token + 1, : len(share)], share)[0]))
    return torch.tensor(out)


@pytest.mark.parametrize("superpixels", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_iou_of_each_token_with_each_target_equals_a_slow_loop(superpixels, seed):
    rng, maps, visual = tokens_of_images(superpixels, seed)
    image_index = [1, 0, 2, 1]
    masks = [(rng.random(SIZES[i]) > 0.5).astype(np.uint8) for i in image_index]
    targets = auxiliary_targets(
        ["grounding"],
        masks=masks,
        image_index=image_index,
        geometry=[],
        grids=GRIDS,
        region_maps=maps if superpixels else None,
        instances=None,
        tokenizer=letters,
    )
    got = token_ious(visual, targets, torch.tensor(image_index))
    expected = torch.stack([slow_iou(visual, maps, i, mask) for i, mask in zip(image_index, masks, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("superpixels", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_word_alignment_equals_a_loop_over_tokens(superpixels, seed):
    _, maps, visual = tokens_of_images(superpixels, seed)
    words = [[["red", "cup"], ["star"]], None, [["blue", "cup"]]]
    upper = np.zeros((24, 18), np.int32)
    upper[16:, :9], upper[16:, 9:] = 1, -1
    labels = [upper, None, np.zeros((16, 16), np.int32)]
    instances = [
        None if one is None else {"labels": image, "words": one} for one, image in zip(words, labels, strict=True)
    ]
    targets = word_targets(instances, GRIDS, maps if superpixels else None, letters)
    vocabulary = ["blue", "cup", "red", "star"]
    table = torch.randn(128, 8)
    language = SimpleNamespace(embed=lambda ids: table[ids.clamp_min(0)])
    embedded = torch.stack([torch.stack([table[ord(one)] for one in word]).mean(0) for word in vocabulary])
    torch.testing.assert_close(word_embeddings(language, targets.ids), embedded)
    embedded = F.normalize(embedded - embedded.mean(0), dim=-1)
    owners = token_owners(visual, targets)
    losses = AuxiliaryLosses(AuxiliaryLossOptions(word_alignment=1.0)).train()
    top = bottom = torch.zeros(())
    for index, item in enumerate(instances):
        for token in range(int(visual.valid[index].sum())):
            if item is None:
                continue
            if superpixels:
                region = int(visual.order[index, token])
                owner = int(instance_of_region(maps[index], item["labels"])[region]) if region >= 0 else -1
            else:
                region, owner = 0, -1
                for number in range(len(item["words"])):
                    share = patch_shares((item["labels"] == number).astype(np.uint8), GRIDS[index])
                    if float(visual.assignment[index, token, : len(share)] @ share) > 0.5:
                        owner = number
            first = 0 if index == 0 else 2
            assert owners[index, token] == (owner + first if owner >= 0 else -1)
            named = item["words"][owner] if owner >= 0 else []
            target = torch.tensor([float(word in named) for word in vocabulary])
            cosine = F.normalize(visual.tokens[index, token], dim=0) @ embedded.T
            loss = F.binary_cross_entropy_with_logits(losses.scale * cosine + losses.bias, target)
            weight = 0.0 if region < 0 else 1.0 if owner >= 0 else NO_INSTANCE_WEIGHT
            top, bottom = top + weight * loss, bottom + weight
        if item is not None and index == 0:
            vision = SimpleNamespace(region_maps=maps if superpixels else None, patches=SimpleNamespace(grids=GRIDS))
            count = int(visual.valid[0].sum())
            assert token_instances(vision, visual, 0, item["labels"]).tolist() == owners[0, :count].tolist()
    assert (owners >= 0).any() and (owners[visual.valid] < 0).any()
    got = losses._word_loss(visual, targets, language)
    torch.testing.assert_close(got, top / bottom)


def test_targets_of_another_projector_are_refused():
    _, maps, visual = tokens_of_images(False, 0)
    mask = np.ones(SIZES[0], np.uint8)
    targets = auxiliary_targets(
        ["grounding"],
        masks=[mask],
        image_index=[0],
        geometry=[],
        grids=GRIDS,
        region_maps=maps,
        instances=None,
        tokenizer=letters,
    )
    with pytest.raises(ValueError, match="from patches"):
        token_ious(visual, targets, torch.tensor([0]))


def test_products_are_float32_under_autocast():
    """What a token covers, and the cosines of word alignment."""
    _, maps, visual = tokens_of_images(False, 0)
    labels = np.random.default_rng(1).integers(-1, 2, SIZES[0]).astype(np.int32)
    item = {"labels": labels, "words": [["red", "cup"], ["star"]]}
    words = word_targets([item, None, None], GRIDS, None, letters)
    words.shares = words.shares * 1.001  # 16 bits would round them
    share = patch_shares((labels == 0).astype(np.uint8), GRIDS[0])
    scale, bias = torch.tensor([8.0]), torch.tensor([-2.0])
    tokens, table, named = torch.randn(6, 8), torch.randn(4, 8), torch.eye(6, 4)

    def values():
        return (
            grid_iou(visual.assignment[:1, :, :6], share[None]),
            token_owners(visual, words),
            word_alignment_loss(tokens, table, named, torch.ones(6), scale, bias),
        )

    expected = values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


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
    targets = auxiliary_targets(
        model.auxiliary_losses.options.enabled,
        masks=[],
        image_index=[],
        geometry=[],
        grids=[],
        region_maps=None,
        instances=None,
        tokenizer=model.language.tokenizer,
    )
    words = word_embeddings(model.language, targets.place_ids)
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
    losses = model.auxiliary_losses.token_losses(encoded.vision, visual, targets, model.language)
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
