import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavis_svp.encoders.checkpoint import read_state_dict

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}


@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors", "folder"])
def test_every_format_is_read(tmp_path, format):
    path = tmp_path / ("model.safetensors" if format in ("safetensors", "folder") else "model.pth")
    if format in ("safetensors", "folder"):
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=format == "zip")
    state = read_state_dict(tmp_path if format == "folder" else path)
    assert set(state) == set(STATE)
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("format", ["pickle", "zip", "legacy"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, format):
    path, trace = tmp_path / "model.pth", tmp_path / "it_ran"
    if format == "pickle":
        path.write_bytes(pickle.dumps({"image_encoder": Harmful(trace)}, protocol=2))
    else:
        torch.save({"x": Harmful(trace)}, path, _use_new_zipfile_serialization=format == "zip")
    with pytest.raises(ValueError, match="model.pth"):
        read_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 100, -50])
def test_a_truncated_file_is_told(tmp_path, suffix, keep):
    path = tmp_path / f"model{suffix}"
    torch.save(STATE, path) if suffix == ".pth" else save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{"model": {"x": torch.ones(1)}, "epoch": 3}, [torch.ones(1)], torch.ones(1)])
def test_something_else_than_a_mapping_of_tensors_is_told(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="mapping of names to tensors"):
        read_state_dict(tmp_path / "model.pth")


@pytest.mark.parametrize("path", ["nowhere.pth", "."])
def test_a_missing_file_is_told(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_state_dict(tmp_path / path)
