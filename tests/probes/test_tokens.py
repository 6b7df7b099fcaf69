"""Shares of variance on tokens put together from known parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.probes.tokens import PLACES, ObjectTokens, variance_shares

COUNT, WIDTH = 3000, 24


def drawn(look_scale, place_scale):
    """Tokens = a vector for each colour + vectors times cos(pi x) and sin(pi y), each part as large as asked for."""
    rng = np.random.default_rng(0)
    tokens = ObjectTokens(0)
    tokens.facts = [
        {
            "instance": 0, **{name: int(rng.integers(len(values))) for name, values in ATTRIBUTES.items()},
            **{name: float(rng.random()) for name in ("x", "y", "area", "height", "width")},
        }
        for _ in range(COUNT)
    ]  # fmt: skip
    colours = rng.normal(size=(len(ATTRIBUTES["color"]), WIDTH))
    look = colours[[row["color"] for row in tokens.facts]]
    waves = [[np.cos(np.pi * row["x"]), np.sin(np.pi * row["y"])] for row in tokens.facts]
    place = np.array(waves) @ rng.normal(size=(2, WIDTH))
    parts = [scale * part / part.std(0).mean() for scale, part in ((look_scale, look), (place_scale, place))]
    for name in PLACES:
        tokens.features[name] = [torch.tensor(parts[0] + parts[1])]
    return tokens


@pytest.mark.parametrize(("look", "place"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (3.0, 1.0)])
def test_shares_are_those_the_tokens_were_made_with(look, place):
    shares = variance_shares(drawn(look, place))["tokens"]
    whole = look**2 + place**2
    assert shares["look"] == pytest.approx(look**2 / whole, abs=0.05)
    assert shares["place"] == pytest.approx(place**2 / whole, abs=0.05)
    assert shares["size"] < 0.05
