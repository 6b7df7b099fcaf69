"""Tensors in files: no changed bit is read as another number, and others' weights run nothing."""

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lavis_svp.common.files import BadFileError
from lavis_svp.common.tensor_files import checksum, load_state, load_tensors, parse_tensors, save_tensors

TENSORS = {
    "patches": torch.arange(12, dtype=torch.float16).reshape(3, 4),
    "valid": torch.tensor([True, False]),
    "number": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def test_tensors_come_back_and_other_programs_read_them(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {**TENSORS, "turned": TENSORS["patches"].T}, {"note": "ours"})
    expected = {**TENSORS, "turned": TENSORS["patches"].T}
    assert same(load_tensors(path), expected) and same(load_file(path), expected)
    assert same(parse_tensors(path.read_bytes(), "here"), expected)


def test_no_changed_bit_gives_other_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS)
    whole = path.read_bytes()
    outcomes = {"refused": 0, "same": 0}
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = parse_tensors(bytes(changed), path)
        except BadFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:  # the padding of the header, or the name of the entry that holds the checksum
            assert same(found, TENSORS)
            outcomes["same"] += 1
    assert outcomes["refused"] > 6 * outcomes["same"] > 0


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 8, (2**63 - 1).to_bytes(8, "little") + b"{}", b"{}" * 40]
)
@pytest.mark.parametrize("read", [load_tensors, load_state])
def test_a_damaged_file_is_one_line(content, read, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match="Make it again") as caught:
        read(path, "Make it again.")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_others_have_no_checksum(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert same(load_tensors(tmp_path / "a.safetensors"), TENSORS)
    assert same(load_state(tmp_path / "a.safetensors"), TENSORS)
    torch.save(TENSORS, tmp_path / "a.pth")
    torch.save(TENSORS, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    assert same(load_state(tmp_path / "a.pth"), TENSORS) and same(load_state(tmp_path / "legacy.bin"), TENSORS)


def test_the_checksum_covers_names_types_and_shapes():
    one = {"a": torch.zeros(2, 3)}
    others = [{"b": one["a"]}, {"a": one["a"].reshape(3, 2)}, {"a": one["a"].to(torch.int32)}, {**one, "b": one["a"]}]
    assert checksum(one) == checksum({"a": torch.zeros(3, 2).T})
    assert all(checksum(other) != checksum(one) for other in others)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("/tmp/lavis_svp_was_here",)


@pytest.mark.parametrize("content", [{"a": Harmful()}, [torch.zeros(1)], {"a": 1}, {"a": {"b": torch.zeros(1)}}])
def test_other_things_than_tensors_are_refused_and_not_run(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(content))
    for name in ("a.pth", "raw.bin"):
        with pytest.raises(BadFileError, match=name):
            load_state(tmp_path / name)
    assert not os.path.exists("/tmp/lavis_svp_was_here")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_weights_of_torch_are_one_line(zipped, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for trial in range(150):
        changed = bytearray(whole[: rng.integers(1, len(whole))] if trial % 3 == 0 else whole)
        for place in rng.integers(0, len(changed), 4):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            load_state(path)
        except BadFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_what_has_no_end_is_refused(tmp_path):
    for name in ("a.safetensors", "a.pth"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadFileError, match="no regular file"):
            load_state(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none.pth")
