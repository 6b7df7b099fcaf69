"""Options of the one-pass superpixels."""

from __future__ import annotations

import json

import pytest

from lavis_svp.superpixels import build_superpixels, check_superpixels
from lavis_svp.superpixels.one_pass.options import OnePassOptions, one_pass_options


def test_settings_are_what_changes_the_result_and_numbers_count_by_value() -> None:
    settings = OnePassOptions(min_strength=0, granularity=1, max_superpixels=7).settings()
    assert settings == {"min_strength": 0.0, "granularity": 1.0, "max_superpixels": 7}
    same = OnePassOptions(head="other", min_strength=0.0, granularity=1.0, max_superpixels=7).settings()
    assert json.dumps(settings) == json.dumps(same)
    assert OnePassOptions().settings()["granularity"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_strenght": 0.2}, "did you mean 'min_strength'"),
        ({"min_strength": -0.1}, r"min_strength must lie in 0..1, got -0.1"),
        ({"min_strength": None}, r"min_strength must lie in 0..1, got None"),
        ({"min_strength": "much"}, r"min_strength must lie in 0..1, got 'much'"),
        ({"granularity": 1.5}, r"granularity must lie in 0..1, got 1.5"),
        ({"granularity": float("nan")}, r"granularity must lie in 0..1, got nan"),
        ({"max_superpixels": 0}, "max_superpixels must be a whole number of at least 1, got 0"),
        ({"max_superpixels": 2.5}, "max_superpixels must be a whole number of at least 1, got 2.5"),
        ({"head": ""}, "must name a boundary head"),
        ({"head": 3}, "head must be a text, got 3"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        one_pass_options(options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        check_superpixels("one_pass", options)


def test_options_of_the_other_generator_say_whose_they_are() -> None:
    with pytest.raises(ValueError, match=r"preset, stability: superpixels 'one_pass' have no such.*name: sam"):
        check_superpixels("one_pass", {"preset": "svp", "stability": 0.75, "granularity": 0.5})
    for call in (lambda **options: check_superpixels("sam", options), lambda **o: build_superpixels("sam", **o)):
        with pytest.raises(ValueError, match=r"head: superpixels 'sam' have no such.*name: one_pass"):
            call(head="one_pass_mobile_sam", max_superpixels=3)
    with pytest.raises(ValueError, match=r"preset: superpixels 'one_pass'"):
        build_superpixels("one_pass", preset="svp")
    check_superpixels("one_pass", {"granularity": 0.5, "max_superpixels": 40})
    check_superpixels("sam", {"granularity": 0.5, "max_superpixels": 40, "preset": "exact"})
