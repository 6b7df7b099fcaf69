"""Weights that say as which model they were trained: another one is refused, key by key."""

from __future__ import annotations

import json
import logging

import pytest
from safetensors.torch import save_file

from lavis_svp.common.checkpoints import CorruptCheckpointError, WrongCheckpointError
from lavis_svp.common.metadata import read_metadata
from lavis_svp.models.options import parse_model_options
from lavis_svp.models.trained_as import check_config_compatible, flat_options, model_json, only_training

SECTION = {"projector": {"name": "svp"}, "readout": {"pointer": True}, "layout": "packed"}


@pytest.fixture
def trained(tmp_path):
    """A state that names the model of ``SECTION``."""
    import torch

    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"model": model_json(parse_model_options(SECTION))})
    return path


def check(path, **changes):
    check_config_compatible(parse_model_options({**SECTION, **changes}), path)


def test_the_same_model_passes_however_it_is_written(trained):
    check(trained)
    check(trained, projector={"name": "svp", "sspe": True})  # the default, spelled out
    check(trained, layout="separate", losses={"ce": 3.0}, aids={"grounding": 1.0}, learning_rates={"readout": 1e-3})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector": {"name": "mlp"}}, "model.projector.name: 'svp' in training, 'mlp' now"),
        ({"projector": {"name": "svp", "sspe": False}}, "model.projector.sspe: 'full' in training, 'off' now"),
        ({"language": {"num_layers": 4}}, "model.language.num_layers: None in training, 4 now"),
        ({"readout": {"pointer": False}}, "model.readout.pointer: True in training, False now"),
        ({"vision_encoder": {"name": "other"}}, "model.vision_encoder.name"),
        ({"aids": {"token_norm": True}}, "model.aids.token_norm: False in training, True now"),
    ],
)
def test_another_architecture_is_refused_with_its_keys(trained, changes, words):
    with pytest.raises(WrongCheckpointError) as error:
        check(trained, **changes)
    assert words in str(error.value) and "load_finetuned: False" in str(error.value)


def test_another_input_is_warned_of(trained, caplog):
    with caplog.at_level(logging.WARNING):
        check(trained, superpixels={"name": "felzenszwalb"}, sam={"side": 512})
    assert "model.superpixels.name: 'sam' in training, 'felzenszwalb' now" in caplog.text
    assert "model.sam.side: 1024 in training, 512 now" in caplog.text


def test_options_of_another_version_are_named(tmp_path):
    import torch

    stored = json.loads(model_json(parse_model_options(SECTION)))
    stored["readout"]["telepathy"] = True
    save_file({"x": torch.zeros(1)}, tmp_path / "new.safetensors", {"model": json.dumps(stored)})
    with pytest.raises(WrongCheckpointError, match="another version of lavis_svp.*telepathy"):
        check(tmp_path / "new.safetensors")


def test_files_without_metadata_and_damaged_ones(tmp_path, trained):
    import torch

    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    check(tmp_path / "bare.safetensors")
    check(tmp_path / "not_even_there.pth")
    trained.write_bytes(trained.read_bytes()[:40])
    with pytest.raises(CorruptCheckpointError, match="no complete safetensors"):
        read_metadata(trained)


def test_every_pattern_is_of_an_option():
    from lavis_svp.models.trained_as import COUNTS_ALL_THE_SAME, ONLY_TRAINING, OTHER_INPUT, _matches

    options = parse_model_options({**SECTION, "learning_rates": {"readout": 1e-3}})
    keys = [*flat_options(options), "learning_rates"]
    for pattern in (*ONLY_TRAINING, *COUNTS_ALL_THE_SAME, *OTHER_INPUT):
        assert any(_matches(key, (pattern,)) for key in keys), pattern
    assert only_training("aids.grounding") and not only_training("aids.token_norm")
