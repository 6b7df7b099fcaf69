"""Old YAML keys keep working for a release, with a warning that names the new one."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest

from lavis_svp.common.options import build_options, is_number, is_whole_number, upgrade_keys

RENAMED = {"aids": "auxiliary_losses", "auxiliary_losses.token_norm": "visual_tokens.norm"}
REMOVED = {"readout.pointer_mask": False}


def test_a_renamed_section_and_a_moved_key():
    old = {"aids": {"token_norm": True, "grounding": 1.0}}
    with pytest.warns(FutureWarning, match="model.aids is now model.auxiliary_losses"):
        new = upgrade_keys(old, RENAMED, REMOVED, "model")
    assert new == {"auxiliary_losses": {"grounding": 1.0}, "visual_tokens": {"norm": True}}
    assert old == {"aids": {"token_norm": True, "grounding": 1.0}}  # left as it was


def test_today_s_keys_pass_silently():
    section = {"auxiliary_losses": {"grounding": 1.0}, "visual_tokens": {"norm": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert upgrade_keys(section, RENAMED, REMOVED, "model") == section


def test_a_removed_option_is_dropped_where_it_did_nothing_and_refused_where_it_did():
    with pytest.warns(FutureWarning, match="readout.pointer_mask does nothing any more"):
        assert upgrade_keys({"readout": {"pointer_mask": False}}, {}, REMOVED, "model") == {"readout": {}}
    with pytest.raises(ValueError, match="readout.pointer_mask is True, but that option was removed"):
        upgrade_keys({"readout": {"pointer_mask": True}}, {}, REMOVED, "model")


def test_an_old_key_counts_over_the_new_one_of_the_packaged_defaults():
    merged = {"auxiliary_losses": {"grounding": 1.0, "alignment_steps": 300}, "aids": {"grounding": 0.0}}
    with pytest.warns(FutureWarning):
        new = upgrade_keys(merged, RENAMED, {}, "model")
    assert new == {"auxiliary_losses": {"grounding": 0.0, "alignment_steps": 300}}


def test_a_dataclass_names_its_own_old_keys():
    @dataclass(frozen=True)
    class Options:
        RENAMED_KEYS: ClassVar = {"per_picture": "per_image"}
        REMOVED_KEYS: ClassVar = {"dead": None}
        per_image: int = 3

    with pytest.warns(FutureWarning, match="sampling.per_picture is now sampling.per_image"):
        assert build_options(Options, {"per_picture": 5, "dead": None}, "sampling").per_image == 5
    with pytest.raises(ValueError, match="Unknown key 'per_pictur'"):
        build_options(Options, {"per_pictur": 5}, "sampling")


@dataclass(frozen=True)
class Kinds:
    count: int = 1
    rate: float | None = 0.5
    name: str = "a"
    on: bool = False
    fields: tuple[str, ...] = ("x",)
    section: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate < 0 or not len(self.fields):
            raise ValueError("negative")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "3"}, r"here.count must be a whole number, got '3'"),
        ({"count": True}, "here.count must be a whole number"),
        ({"rate": "x"}, "here.rate must be a number, got 'x'"),
        ({"name": 5}, "here.name must be a text"),
        ({"on": "yes"}, "here.on must be true or false"),
        ({"section": [{"root": "/x"}]}, "here.section must be a mapping"),
        ({"fields": 5}, "here has a value of a wrong kind"),
    ],
)
def test_a_value_of_another_kind_is_told(values, message):
    with pytest.raises(ValueError, match=message):
        build_options(Kinds, values, "here")


def test_whole_numbers_are_numbers_and_none_is_what_the_class_makes_of_it():
    assert build_options(Kinds, {"rate": 1}, "here").rate == 1
    assert build_options(Kinds, {"rate": None, "name": None}, "here").name is None


def test_numbers_are_told_from_what_looks_like_them():
    assert [value for value in (0, 7, 2**63 - 1, 2**63, -1, 1.0, True, "1", None) if is_whole_number(value)] == [
        0, 7, 2**63 - 1,
    ]  # fmt: skip
    assert is_whole_number(-1, least=-1) and not is_whole_number(9, most=8)
    numbers = (0, -1.5, 10**300, 10**400, float("nan"), float("inf"), True, "1", None)
    assert [value for value in numbers if is_number(value)] == [0, -1.5, 10**300]
