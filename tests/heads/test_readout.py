from __future__ import annotations

import pytest
import torch

from lavis_svp.heads.readout import SegPromptHead, SegPromptOptions

DIM = 16


def inputs():
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, DIM)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    image = torch.tensor([0, 0, 1])
    return torch.randn(3, DIM), image, tokens, valid


def test_the_papers_form_is_the_plain_mlp():
    readout = SegPromptHead(DIM, 1.0, SegPromptOptions())
    states, image, tokens, valid = inputs()
    prompts = readout(states, image, tokens, valid)
    torch.testing.assert_close(prompts.sparse[:, 0], readout.mlp(states))
    assert prompts.area is None and prompts.scores is None
    assert [type(m).__name__ for m in readout.mlp] == ["Linear", "ReLU", "Linear"]


def test_the_pointer_never_chooses_padding_and_ignores_batch_mates():
    readout = SegPromptHead(DIM, 1.0, SegPromptOptions(pointer=True)).eval()
    states, image, tokens, valid = inputs()
    prompts = readout(states, image, tokens, valid)
    chances = prompts.scores.exp()
    torch.testing.assert_close(chances.sum(-1), torch.ones(3))
    assert chances[2, 2:].max() == 0
    alone = readout(states[2:], torch.tensor([0]), tokens[1:, :2], valid[1:, :2])
    torch.testing.assert_close(alone.sparse[0], prompts.sparse[2])


def test_position_and_area_are_those_of_the_chosen_token():
    options = SegPromptOptions(pointer=True, pointer_position=True, pointer_mask=True)
    readout = SegPromptHead(DIM, 1.0, options).eval()
    states, image, tokens, valid = inputs()
    with torch.no_grad():
        readout.query.weight.zero_()
        readout.query.bias.fill_(30.0)
        readout.key.weight.zero_()
        readout.key.weight[:, 0] = 1.0  # the token with the largest first feature wins
        readout.key.bias.zero_()
        tokens[..., 0] = 0
        tokens[0, 3, 0] = tokens[1, 1, 0] = 50
    positions, areas, point = torch.randn(2, 5, 256), torch.rand(2, 5, 4, 4), torch.randn(256)
    prompts = readout(states, image, tokens, valid, positions, areas, point)
    for row, (b, t) in enumerate([(0, 3), (0, 3), (1, 1)]):
        torch.testing.assert_close(prompts.sparse[row, 0], positions[b, t] + point)  # the MLP starts at zero
        torch.testing.assert_close(prompts.area[row], areas[b, t])


def test_batch_norm_takes_a_single_state_and_is_fixed_in_evaluation():
    readout = SegPromptHead(DIM, 1.0, SegPromptOptions(state_norm="batch"))
    states, image, tokens, valid = inputs()
    readout.train()
    assert torch.isfinite(readout(states[:1], image[:1], tokens, valid).sparse).all()
    readout(states, image, tokens, valid)
    readout.eval()
    together = readout(states, image, tokens, valid).sparse
    torch.testing.assert_close(readout(states[1:2], image[1:2], tokens, valid).sparse, together[1:2])


def test_bad_options_and_missing_inputs_are_refused():
    with pytest.raises(ValueError, match="state_norm"):
        SegPromptOptions(state_norm="layer")
    with pytest.raises(ValueError, match="pointer: true"):
        SegPromptOptions(pointer_mask=True)
    readout = SegPromptHead(DIM, 1.0, SegPromptOptions(pointer=True, pointer_position=True))
    with pytest.raises(ValueError, match="positions"):
        readout(*inputs())
