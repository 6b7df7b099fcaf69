"""Files that nobody vouches for: what is opened, how deep it is read, and that what was written is what is read."""

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.common.files import (
    MAX_QUOTED,
    MAX_YAML_DEPTH,
    BadFileError,
    BrokenFileError,
    file_errors,
    is_outside,
    one_line,
    open_regular,
    parse_json,
    read_checked_json,
    read_json,
    read_regular,
    read_yaml,
    relative_name,
    shown,
    write_checked_json,
)


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read_regular(tmp_path / "a") == b"abc"
    assert read_regular(str(tmp_path / "a"), max_bytes=3) == b"abc"
    with pytest.raises(BadFileError, match="has 3 bytes; .* at most 2"):
        read_regular(tmp_path / "a", max_bytes=2)


def test_what_has_no_end_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("fifo", "link", "."):
        with pytest.raises(BadFileError, match="no regular file"):
            open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        open_regular(tmp_path / "none")
    with pytest.raises(BadFileError, match="cannot be opened"):
        open_regular("a\0b")


@pytest.mark.parametrize("name", ["a.jpg", "a/b.jpg", "./a", "a..b/c"])
def test_names_within_a_folder(name):
    assert relative_name(name) == name


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "", ".", "a\0.jpg"])
def test_names_that_lead_out_or_name_nothing(name):
    with pytest.raises(ValueError, match="^refs 3: "):
        relative_name(name, "refs 3")


def test_links_out_of_a_folder_are_seen(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / "own.jpg").write_bytes(b"")
    (tmp_path / "out.jpg").write_bytes(b"")
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    (tmp_path / "in" / "deeper" / "within").symlink_to(tmp_path / "in" / "own.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    inside = [tmp_path / "in" / "own.jpg", tmp_path / "in" / "deeper" / "within"]
    assert [is_outside(path, tmp_path / "in") for path in inside] == [False, False]
    assert is_outside(tmp_path / "in" / "out" / "out.jpg", tmp_path / "in")
    assert not is_outside(tmp_path / "linked" / "own.jpg", tmp_path / "linked")  # the folder itself may be a link


def test_one_line():
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert len(one_line("x" * 10_000)) < MAX_QUOTED + 10


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), IndexError(), AttributeError("x"), RecursionError(), UnicodeError(), OSError("Pillow's"),
     OSError(errno.EINVAL, "of mmap")],
)  # fmt: skip
def test_whatever_a_damaged_file_raises_becomes_one_line(error):
    with pytest.raises(BadFileError, match=r"^refs\.p is damaged .* Fetch it\.$"), file_errors("refs.p", "Fetch it."):
        raise error


@pytest.mark.parametrize(
    "error", [BrokenFileError("one"), PermissionError("two"), MemoryError("three"), OSError(errno.EIO, "four")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, file_errors("refs.p"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyError("a"), BadFileError("b")])
def test_errors_of_a_stated_kind(error):
    told = "^b$" if isinstance(error, BadFileError) else r"^refs\.p is damaged"
    with pytest.raises(BrokenFileError, match=told), file_errors("refs.p", kind=BrokenFileError):
        raise error


SHOWN = {"text": "a" * 10_000, "deep": [[[[[1] * 9] * 9] * 9] * 9], "long": 10**5000, "lines": {"a": "\n"}}


@pytest.mark.parametrize("value", SHOWN.values(), ids=SHOWN)
def test_a_shown_value_is_short(value):
    assert 0 < len(shown(value)) < MAX_QUOTED + 10 and "\n" not in shown(value)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[" * 1_000_000, b'{"a":' * 200_000, b"1" * 5000, b"", b"{'a': 1}"]
)
def test_json_that_is_none_is_one_line(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadFileError) as caught:
        read_json(path, "Mend it.")
    message = str(caught.value)
    assert message.startswith(f"{path} is truncated or not JSON") and message.endswith("Mend it.")
    assert "\n" not in message and len(message) < 500


def test_json_is_read():
    assert parse_json('{"a": [1, "ä"]}'.encode(), "here") == {"a": [1, "ä"]}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(content=st.dictionaries(st.text(st.characters(codec="utf-8")).filter(lambda key: key != "sha256"), JSON_VALUES))
def test_checked_json_comes_back(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("checked") / "a.json"
    write_checked_json(path, content)
    assert read_checked_json(path) == content
    assert {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"} == content


def test_no_changed_bit_of_checked_json_gives_other_content(tmp_path):
    path, content = tmp_path / "a.json", {"samples": [["train-1", 12, {"json": [512, 99, 7]}]], "format": 1}
    write_checked_json(path, content)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read_checked_json(path)
        except BadFileError:
            refused += 1
        else:  # the name of the entry "sha256" itself
            assert content.items() <= found.items() and len(found) == 3
    assert refused > 7.5 * len(whole)


def test_json_of_older_releases_has_no_sum(tmp_path):
    (tmp_path / "a.json").write_text('{"format": 1}')
    assert read_checked_json(tmp_path / "a.json") == {"format": 1}
    (tmp_path / "a.json").write_text('{"format": 1, "sha256": "0"}')
    with pytest.raises(BadFileError, match="does not match the sha256 in it. Make it again"):
        read_checked_json(tmp_path / "a.json", "Make it again.")


def nested_aliases(levels):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 1_000_000, "nested deeper"),
        ("{a: " * 200_000, "nested deeper"),
        ("- " * 200_000, "nested deeper"),
        ("? " * 200_000, "nested deeper"),
        (nested_aliases(9), "aliases written out"),
        ("a: &a [*a]", "recursive"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("a: b: c", "mapping values"),
        ("a: \0", "unacceptable"),
        ("3", "YAML"),
        ("a: 1\na: 2", "duplicate"),
    ],
)
def test_yaml_that_cannot_be_used_is_one_line(text, reason, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(BadFileError, match=reason) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"a: {{b: [1, 2]}}\nc: &c [1]\nd: *c\ne: {'[' * (MAX_YAML_DEPTH - 1)}{']' * (MAX_YAML_DEPTH - 1)}\n"
    )
    content = read_yaml(path)
    assert content.a.b == [1, 2] and content.d == [1]
    path.write_bytes(b"a: \xff")
    with pytest.raises(BadFileError, match="UnicodeDecodeError"):
        read_yaml(path)
    path.write_bytes(b"#" * 11_000_000)
    with pytest.raises(BadFileError, match="at most 10,000,000"):
        read_yaml(path)


def test_deep_yaml_ends_in_a_small_process(tmp_path):
    """A billion values in nine lines take neither memory nor time."""
    (tmp_path / "a.yaml").write_text(nested_aliases(9))
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (6_000_000_000,) * 2)
from lavis_svp.common.files import read_yaml
read_yaml({str(tmp_path / "a.yaml")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "aliases written out" in done.stderr.splitlines()[-1]
