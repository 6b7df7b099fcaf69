from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.datasets.refthings.colors import _PERHAPS, _SURE, COLORS, color_verdicts, oklch

# What nobody disputes, by CSS's names or close to them.
PLAIN = {
    "red": [(220, 20, 40), (200, 30, 30), (178, 34, 34)],
    "orange": [(255, 150, 30), (255, 140, 0), (245, 130, 32)],
    "yellow": [(255, 230, 0), (250, 220, 50), (255, 215, 0)],
    "green": [(0, 128, 0), (60, 170, 60), (34, 139, 34)],
    "blue": [(0, 0, 255), (65, 105, 225), (70, 130, 220), (20, 40, 160)],
    "purple": [(128, 0, 128), (120, 60, 180), (100, 40, 150)],
    "pink": [(255, 130, 190), (255, 150, 180), (255, 105, 180)],
    "brown": [(110, 70, 40), (101, 67, 33), (90, 50, 25)],
    "black": [(10, 10, 10), (25, 25, 28)],
    "white": [(250, 250, 250), (240, 240, 238)],
    "gray": [(128, 128, 128), (150, 150, 152)],
}
FAR = {"red": "green blue white", "orange": "green blue purple black", "yellow": "blue purple red black",
       "green": "red blue purple pink white", "blue": "red orange yellow green", "purple": "green yellow orange white",
       "pink": "green blue black", "brown": "green blue white purple", "black": "white red yellow",
       "white": "black red blue green", "gray": "red blue green yellow"}  # fmt: skip

rgb = st.tuples(*[st.integers(0, 255)] * 3)


def verdicts_of(*pixels):
    return dict(zip(COLORS, color_verdicts(np.array(pixels)).tolist(), strict=True))


@pytest.mark.parametrize(("color", "value"), [(color, value) for color, values in PLAIN.items() for value in values])
def test_plain_colours_have_their_names(color, value):
    found = verdicts_of(value)
    assert [one for one, verdict in found.items() if verdict == 1] == [color]
    assert all(found[other] == -1 for other in FAR[color].split())


@given(rgb)
def test_a_sure_colour_is_always_a_possible_one_and_at_most_one_is_sure(value):
    place = oklch(np.array([value]))
    sure = [color for color in COLORS if _SURE[color].holds(*place)[0]]
    assert len(sure) <= 1
    assert all(_PERHAPS[color].holds(*place)[0] for color in sure)


@given(st.lists(rgb, min_size=1, max_size=12))
def test_verdicts_do_not_depend_on_the_order_or_the_number_of_pixels(pixels):
    assert verdicts_of(*pixels) == verdicts_of(*pixels[::-1]) == verdicts_of(*pixels, *pixels)


def test_mixtures_are_disputable():
    half = verdicts_of(*[(220, 20, 40)] * 5, *[(0, 0, 255)] * 5)
    assert half["red"] != -1 and half["blue"] != -1 and 1 not in (half["red"], half["blue"]) and half["green"] == -1
    spotted = verdicts_of(*[(220, 20, 40)] * 8, *[(250, 250, 250)] * 2)
    assert spotted["red"] == 1 and spotted["white"] == 0


def test_oklch_of_known_colours():
    lightness, chroma, hue = oklch(np.array([(255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0)]))
    assert np.allclose(lightness, [1, 0.628, 0.452, 0], atol=2e-3)
    assert np.allclose(chroma, [0, 0.2577, 0.3132, 0], atol=2e-3)
    assert np.allclose(hue[1:3], [29.23, 264.05], atol=0.1)
