from __future__ import annotations

import math

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from lavis_svp.language.splice import NounStates
from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.mask_decoder import SegMaskDecoder
from lavis_svp.segmentation.no_target import pointer_evidence
from lavis_svp.segmentation.seg_prompt import (
    NounEvidence,
    SegPromptHead,
    SegPromptOptions,
    StateNorm,
    token_positions,
)
from lavis_svp.vision.feature_extractor import VisionFeatures
from lavis_svp.vision.geometry import SamInputGeometry
from lavis_svp.vision.types import PatchFeatures

DIM = 16


def inputs():
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, DIM)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    image = torch.tensor([0, 0, 1])
    return torch.randn(3, DIM), image, VisualTokens(tokens, valid)


def test_the_papers_form_is_the_plain_mlp():
    head = SegPromptHead(DIM, 1.0, SegPromptOptions())
    states, image, visual = inputs()
    prompts = head(states, image, visual)
    torch.testing.assert_close(prompts.sparse[:, 0], head.mlp(states))
    assert prompts.scores is None
    assert [type(m).__name__ for m in head.mlp] == ["Linear", "ReLU", "Linear"]


def test_the_pointer_never_chooses_padding_and_ignores_batch_mates():
    head = SegPromptHead(DIM, 1.0, SegPromptOptions(pointer=True)).eval()
    states, image, visual = inputs()
    prompts = head(states, image, visual)
    chances = prompts.scores.exp()
    torch.testing.assert_close(chances.sum(-1), torch.ones(3))
    assert chances[2, 2:].max() == 0
    alone = head(states[2:], torch.tensor([0]), VisualTokens(visual.tokens[1:, :2], visual.valid[1:, :2]))
    torch.testing.assert_close(alone.sparse[0], prompts.sparse[2])


def test_the_position_is_that_of_the_chosen_token():
    options = SegPromptOptions(pointer=True, pointer_position=True)
    head = SegPromptHead(DIM, 1.0, options).eval()
    states, image, visual = inputs()
    with torch.no_grad():
        head.query.weight.zero_()
        head.query.bias.fill_(30.0)
        head.key.weight.zero_()
        head.key.weight[:, 0] = 1.0  # the token with the largest first feature wins
        head.key.bias.zero_()
        visual.tokens[..., 0] = 0
        visual.tokens[0, 3, 0] = visual.tokens[1, 1, 0] = 50
    positions, point = torch.randn(2, 5, 256), torch.randn(256)
    prompts = head(states, image, visual, positions, point)
    for row, (b, t) in enumerate([(0, 3), (0, 3), (1, 1)]):
        torch.testing.assert_close(prompts.sparse[row, 0], positions[b, t] + point)  # the MLP starts at zero


def test_batch_norm_takes_a_single_state_and_is_fixed_in_evaluation():
    head = SegPromptHead(DIM, 1.0, SegPromptOptions(state_norm="batch"))
    states, image, visual = inputs()
    head.train()
    assert torch.isfinite(head(states[:1], image[:1], visual).sparse).all()
    head(states, image, visual)
    head.eval()
    together = head(states, image, visual).sparse
    torch.testing.assert_close(head(states[1:2], image[1:2], visual).sparse, together[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_takes_running_statistics_of_any_type(dtype):
    """DeepSpeed before 0.19, and a cast of the model, keep buffers in 16 bits."""
    torch.manual_seed(0)
    exact, cast = StateNorm(DIM), StateNorm(DIM).to(dtype)
    for _ in range(3):
        states = torch.randn(8, DIM) * 3 + 1
        torch.testing.assert_close(cast.train()(states), exact.train()(states))
    assert cast.running_mean.dtype == cast.running_var.dtype == dtype and cast.running_mean.any()
    torch.testing.assert_close(cast.running_mean.float(), exact.running_mean, atol=0.01, rtol=0.01)
    torch.testing.assert_close(cast.running_var.float(), exact.running_var, atol=0.01, rtol=0.01)
    torch.testing.assert_close(cast.eval()(states), exact.eval()(states), atol=0.02, rtol=0.02)


def test_the_pointer_chooses_in_float32_under_autocast():
    """Its queries and keys come out of 16-bit layers; scores, softmax and means over tokens and places do not."""
    head = SegPromptHead(DIM, 0.7, SegPromptOptions(pointer=True, pointer_position=True)).eval()
    states, image, visual = inputs()
    positions, point = torch.randn(2, 5, 256), torch.randn(256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, key = head.query(states).float(), head.key(visual.tokens / 0.7).float()
        prompts = head(states, image, visual, positions, point)
    assert prompts.scores.dtype == prompts.sparse.dtype == torch.float32
    for row, index in enumerate(image.tolist()):
        count = int(visual.valid[index].sum())
        scores = (key[index, :count] @ query[row]) / 128**0.5
        torch.testing.assert_close(prompts.scores[row, :count], scores.log_softmax(0), atol=1e-5, rtol=0)
        place = scores.softmax(0) @ positions[index, :count]  # the MLP starts at zero
        torch.testing.assert_close(prompts.sparse[row, 0], place + point, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"state_norm": "batch"}, {"state_norm": "batch", "pointer": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_in_16_bits_comes_near_float32(options, dtype):
    head = SegPromptHead(DIM, 1.0, SegPromptOptions(**options)).eval()
    states, image, visual = inputs()
    expected = head(states, image, visual)
    low = VisualTokens(visual.tokens.to(dtype), visual.valid)
    got = head.to(dtype)(states.to(dtype), image, low)
    torch.testing.assert_close(got.sparse.float(), expected.sparse, atol=0.03, rtol=0.03)
    mixed = head(states, image, visual)  # states in float32, as a language model in another type gives them
    torch.testing.assert_close(mixed.sparse.float(), expected.sparse, atol=0.03, rtol=0.03)


def test_bad_options_and_missing_inputs_are_refused():
    with pytest.raises(ValueError, match="state_norm"):
        SegPromptOptions(state_norm="layer")
    with pytest.raises(ValueError, match="pointer: true"):
        SegPromptOptions(pointer_position=True)
    head = SegPromptHead(DIM, 1.0, SegPromptOptions(pointer=True, pointer_position=True))
    with pytest.raises(ValueError, match="positions"):
        head(*inputs())


def sam_decoder():
    transformer = TwoWayTransformer(depth=1, embedding_dim=256, mlp_dim=8, num_heads=2)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    return SegMaskDecoder(PromptEncoder(256, (4, 4), (64, 64), 16), decoder)


def test_positions_are_float32_under_autocast():
    torch.manual_seed(0)
    features = PatchFeatures(torch.zeros(1, 15, 3), [(3, 5)], torch.ones(1, 15, dtype=torch.bool))
    vision = VisionFeatures(
        features, torch.zeros(1, 256, 4, 4), None, [SamInputGeometry(64, (40, 64), (10, 16))], [(1.0, 1.0)]
    )
    visual = VisualTokens(torch.zeros(1, 4, 8), torch.ones(1, 4, dtype=torch.bool), torch.rand(1, 4, 15).softmax(-1))
    decoder = sam_decoder()
    expected = token_positions(visual, vision, decoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_positions(visual, vision, decoder)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_positions_are_patch_centres_in_sams_input():
    features = PatchFeatures(torch.zeros(1, 6, 3), [(2, 3)], torch.ones(1, 6, dtype=torch.bool))
    geometry = SamInputGeometry(64, (32, 64), (100, 200))  # twice as wide as high: the upper half
    decoder = sam_decoder()
    visual = VisualTokens(torch.zeros(1, 6, 4), torch.ones(1, 6, dtype=torch.bool), torch.eye(6)[None])
    stretched = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [geometry], [(1.0, 1.0)])
    positions = token_positions(visual, stretched, decoder)
    for n in range(6):
        x, y = (n % 3 + 0.5) / 3, (n // 3 + 0.5) / 2 * 0.5
        torch.testing.assert_close(positions[0, n], decoder.position_of(torch.tensor(x), torch.tensor(y)))
    padded = VisionFeatures(features, torch.zeros(1, 256, 4, 4), None, [geometry], [(0.5, 1.0)])
    positions = token_positions(visual, padded, decoder)
    torch.testing.assert_close(positions[0, 0], decoder.position_of(torch.tensor(0.5 / 3), torch.tensor(0.25)))
    with pytest.raises(ValueError, match="pointer_position"):
        token_positions(VisualTokens(visual.tokens, visual.valid), stretched, decoder)


def noun_inputs():
    states, image, visual = inputs()
    visual.classes = torch.randn(2, 5, 7).log_softmax(-1)
    table = torch.rand(4, 7) > 0.5
    nouns = NounStates(torch.randn(3, 2, DIM), torch.tensor([[0, 2], [3, -1], [-1, -1]]))
    return states, image, visual, table, nouns


@torch.no_grad()
def test_noun_evidence_equals_a_plain_sum_over_nouns_and_classes():
    states, image, visual, table, nouns = noun_inputs()
    evidence = NounEvidence(DIM, 8, table)
    found = evidence(states, image, nouns, visual.classes)
    for p in range(3):
        query = evidence.query(states[p])
        chances = [0.0]  # of none
        known = [j for j in range(2) if nouns.ids[p, j] >= 0]
        chances += [float(query @ evidence.key(evidence.norm(nouns.states[p, j]))) / 8**0.5 for j in known]
        shares = torch.tensor(chances).softmax(0)[1:]
        for t in range(5):
            expected = 0.0
            for share, j in zip(shares, known, strict=True):
                probability = sum(
                    float(visual.classes[image[p], t, k].exp()) for k in range(7) if table[nouns.ids[p, j], k]
                )
                expected += float(share) * math.log(probability + NounEvidence.FLOOR)
            assert float(found[p, t]) == pytest.approx(expected, abs=1e-5)
    assert found[2].abs().max() == 0  # no known noun


def test_the_choice_of_no_such_thing_competes_with_the_tokens():
    options = SegPromptOptions(pointer=True, pointer_nouns=True, pointer_absent=True)
    states, image, visual, table, nouns = noun_inputs()
    head = SegPromptHead(DIM, 1.0, options, table).eval()
    with torch.no_grad():
        head.absent.weight.zero_()
        head.absent.bias.fill_(0.5)
    prompts = head(states, image, visual, nouns=nouns)
    torch.testing.assert_close(prompts.scores.exp().sum(-1) + prompts.absent.exp(), torch.ones(3))
    with torch.no_grad():
        head.absent.bias.fill_(50.0)
    sure = head(states, image, visual, nouns=nouns)
    assert sure.absent.exp().min() > 0.99
    torch.testing.assert_close(sure.sparse, prompts.sparse)  # the prompt is of the tokens alone
    torch.testing.assert_close(sure.scores.log_softmax(-1), prompts.scores.log_softmax(-1))
    torch.testing.assert_close(pointer_evidence(prompts), (1 / prompts.absent.exp() - 1).log(), rtol=1e-4, atol=1e-4)
    first, others = prompts.split(1)
    assert (len(first.sparse), len(first.scores), len(others.absent)) == (1, 1, 2)


def test_noun_evidence_points_at_what_the_classifier_names_before_any_training():
    states, image, visual, _, nouns = noun_inputs()
    visual.classes = torch.full((2, 5, 7), 1e-6).log()
    visual.classes[0, 3, 0] = visual.classes[1, 1, 0] = 0.0
    head = SegPromptHead(DIM, 1.0, SegPromptOptions(pointer=True, pointer_nouns=True), torch.eye(4, 7).bool()).eval()
    named = NounStates(nouns.states, torch.zeros_like(nouns.ids))
    assert head(states, image, visual, nouns=named).scores.argmax(-1).tolist() == [3, 3, 1]


@pytest.mark.parametrize("key", ["pointer_nouns", "pointer_absent", "pointer_position"])
def test_what_the_pointer_does_needs_the_pointer(key):
    with pytest.raises(ValueError, match=f"{key} needs pointer: true"):
        SegPromptOptions(**{key: True})
