"""`vision_zip` against loops, and as a drop-in for an `mlp` checkpoint."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projector_checks import make_batch, make_projector
from torch.nn import functional as F

from lavis_svp.projectors import build_projector


def slow_tokens(patches, attention, keys, valid, dominant, contextual):
    """Vectors of one image's tokens before the MLP."""
    real = [n for n in range(len(valid)) if valid[n]]
    kept = sorted(sorted(real, key=lambda n: (-attention[n], n))[:dominant])
    rest = [n for n in real if n not in kept]
    tokens = [patches[n] for n in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    joined = {target: [] for target in targets}
    for n in rest:
        if targets and n not in joined:
            alike = [float(F.cosine_similarity(keys[n], keys[target], dim=0)) for target in targets]
            joined[targets[alike.index(max(alike))]].append(patches[n])
    return tokens + [patches[t] + (torch.stack(mine).mean(0) if mine else 0) for t, mine in joined.items()]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), dominant=st.integers(1, 9), contextual=st.integers(0, 6))
def test_tokens_are_those_of_loops(seed, dominant, contextual):
    projector = make_projector("vision_zip", dominant=dominant, contextual=contextual)
    features, _ = make_batch([(5, 4), (2, 3)], seed=seed)
    packed, lengths = projector(features).packed()
    for b, tokens in enumerate(packed.split(lengths)):
        given_b = (x[b] for x in (features.patches, features.cls_attention, features.keys, features.valid))
        expected = slow_tokens(*given_b, dominant, contextual)
        assert len(tokens) == len(expected)
        torch.testing.assert_close(tokens, projector.head(torch.stack(expected)), atol=1e-4, rtol=1e-4)


def test_an_mlp_checkpoint_loads_unchanged_and_gives_its_tokens_where_nothing_is_dropped():
    settings_ = {"vision_dim": 16, "llm_dim": 24, "grid": (5, 4), "patch_norm": True, "token_std": 0.1}
    mlp = build_projector("mlp", **settings_)
    zipped = build_projector("vision_zip", **settings_)
    zipped.load_state_dict(mlp.state_dict())  # strict: the same names and shapes
    features, _ = make_batch([(5, 4), (3, 2)])
    assert torch.equal(zipped(features).tokens[0, :16], mlp(features).tokens[0, :16])  # 16 valid patches, 40 tokens
    few = build_projector("vision_zip", **settings_, dominant=2, contextual=0)
    few.load_state_dict(mlp.state_dict())
    best = features.cls_attention.masked_fill(~features.valid, 0).topk(2).indices.sort().values
    torch.testing.assert_close(few(features).tokens[0], mlp(features).tokens[0, best[0]])


@pytest.mark.parametrize("missing", ["cls_attention", "keys"])
def test_what_it_needs_is_named(missing):
    features, _ = make_batch([(5, 4)])
    setattr(features, missing, None)
    with pytest.raises(ValueError, match=f"'vision_zip' needs {missing}"):
        make_projector("vision_zip")(features)


def test_equal_attention_goes_by_index():
    features, _ = make_batch([(2, 4)], cut=[(0, 0)])
    features.cls_attention = torch.full((1, 8), 0.125)
    result = make_projector("vision_zip", dominant=3, contextual=1)(features)
    assert result.assignment[0, :3].argmax(1).tolist() == [0, 1, 2]
    assert result.assignment[0, 3].tolist() == pytest.approx([0, 0, 0, 0.5, *[0.125] * 4])
