"""Saving and loading a projector alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavis_svp.common.files import BadFileError
from lavis_svp.projectors import build_projector, list_projectors, load_projector, save_projector
from lavis_svp.projectors.io import FORMAT_KEY, describe

SIZES = {"vision_dim": 16, "llm_dim": 8, "grid": (8, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list_projectors())
def test_round_trip(name, dtype, tmp_path):
    projector = build_projector(name, **SIZES, token_std=0.1).to(dtype)
    loaded = load_projector(save_projector(tmp_path / "new" / "p.safetensors", projector))
    assert describe(loaded) == describe(projector) and not loaded.training
    assert loaded.options == projector.options
    expected = projector.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["p.safetensors"]  # no draft left behind


def test_a_file_that_names_removed_options_loads_quietly_at_their_defaults(tmp_path, recwarn):
    path = save_projector(tmp_path / "p.safetensors", build_projector("svp", **SIZES))
    settings = describe(build_projector("svp", **SIZES))
    settings["options"] |= {"token_order": "raster", "sspe_merge": "concat", "sspe_self_attention": False}
    save_file(load_file(path), path, metadata={FORMAT_KEY: json.dumps(settings)})
    assert load_projector(path).options == build_projector("svp", **SIZES).options and not recwarn.list
    settings["options"]["token_order"] = "area"
    save_file(load_file(path), path, metadata={FORMAT_KEY: json.dumps(settings)})
    with pytest.raises(ValueError, match="token_order"):
        load_projector(path)


def test_mismatch_is_explained(tmp_path):
    path = save_projector(tmp_path / "p.safetensors", build_projector("mlp", **SIZES))
    tensors = load_file(path)
    settings = describe(build_projector("mlp", **{**SIZES, "llm_dim": 9}))
    save_file({**tensors, "extra": torch.zeros(1)}, path, metadata={FORMAT_KEY: json.dumps(settings)})
    with pytest.raises(ValueError, match=r"unexpected: \['extra'\]; other shape: \['head.0.bias \(8,\) for \(9,\)'"):
        load_projector(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_projector(tmp_path / "nowhere")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="damaged"):
        load_projector(broken)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="save_projector"):
        load_projector(tmp_path / "other.safetensors")


def with_settings(path, **changes):
    """A projector's file whose settings have these entries in place of its own."""
    settings = {**describe(build_projector("mlp", **SIZES)), **changes}
    save_file(load_file(path), path, metadata={FORMAT_KEY: json.dumps(settings)})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": None}, {"name": []}, {"name": "no_such"}, {"version": []}, {"options": []}, {"options": {"x": 1}},
        {"vision_dim": None}, {"vision_dim": "16"}, {"llm_dim": 10**9}, {"vision_dim": 10**30}, {"grid": 8},
        {"grid": [8]}, {"grid": [10**12, 10**12], "name": "svp"}, {"llm_dim": float("nan")}, {"llm_dim": float("inf")},
    ],
)  # fmt: skip
def test_impossible_settings_are_an_error_that_names_the_file(tmp_path, changes):
    path = save_projector(tmp_path / "p.safetensors", build_projector("mlp", **SIZES))
    with_settings(path, **changes)
    with pytest.raises(BadFileError) as caught:
        load_projector(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 200_000, "{}"])
def test_settings_that_are_no_json_mapping_name_the_file(tmp_path, text):
    path = save_projector(tmp_path / "p.safetensors", build_projector("mlp", **SIZES))
    save_file(load_file(path), path, metadata={FORMAT_KEY: text})
    with pytest.raises(BadFileError) as caught:
        load_projector(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_every_flipped_bit_of_the_numbers_is_found(tmp_path):
    path = save_projector(tmp_path / "p.safetensors", build_projector("mlp", **SIZES))
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for position in range(begin, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(BadFileError, match="checksum"):
            load_projector(path)
