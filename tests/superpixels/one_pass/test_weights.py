"""Files of boundary heads: what is written comes back, and nothing that is wrong gets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lavis_svp.common.files import BadFileError
from lavis_svp.common.tensor_files import save_tensors
from lavis_svp.superpixels.one_pass.head import BoundaryHead
from lavis_svp.superpixels.one_pass.weights import SHIPPED_HEADS, HeadFacts, head_file, load_head, save_head


def test_a_head_comes_back_folded_and_says_the_same(random_head: BoundaryHead, random_head_file: Path) -> None:
    head, digest, facts = load_head(random_head_file)
    assert facts == HeadFacts("tiny_vit", (128,), {"steps": 0}) and len(digest) == 64
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in head.modules())
    assert not head.training and not any(value.requires_grad for value in head.parameters())
    embedding, image = torch.randn(1, 256, 4, 4), torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        for one, other in zip(head(embedding, image), random_head(embedding, image), strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_the_digest_is_of_the_weights_alone(random_head: BoundaryHead, random_head_file: Path, tmp_path: Path) -> None:
    digest = load_head(random_head_file).digest
    save_head(tmp_path / "again", random_head.folded(), HeadFacts("vit_h", (1024,)))
    assert load_head(tmp_path / "again").digest == digest
    other = random_head.folded()
    with torch.no_grad():
        other.affinities.bias[0] += 1e-3
    save_head(tmp_path / "other", other, HeadFacts("tiny_vit", (128,), {"steps": 0}))
    assert load_head(tmp_path / "other").digest != digest


def test_the_head_that_is_saved_stays_as_it_is(random_head: BoundaryHead, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in random_head.state_dict().items()}
    save_head(tmp_path / "head", random_head, HeadFacts("tiny_vit", (128,)))
    after = random_head.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_heads_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'one_pass_sam'.*neither one_pass_mobile_sam.*superpixels train"):
        load_head("one_pass_sam")
    monkeypatch.setattr("lavis_svp.superpixels.one_pass.weights._FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="comes with the package, but .* is not there"):
        head_file(SHIPPED_HEADS[0])


@pytest.mark.parametrize("name", SHIPPED_HEADS)
def test_the_shipped_heads_load_and_are_small(name: str) -> None:
    path = head_file(name)
    assert path.stat().st_size <= 4_000_000
    head, _, facts = load_head(name)
    assert facts.encoder == "tiny_vit" and set(facts.sides) <= set(range(16, 1025, 16)) and facts.trained
    assert sum(value.numel() for value in head.parameters()) < 1_000_000


def changed(file: Path, path: Path, tensors: Callable = lambda t: t, **metadata: str | None) -> Path:
    """A copy with other tensors or metadata, and a checksum that is right."""
    with safe_open(file, "pt") as opened:
        facts = {**opened.metadata(), **metadata}
    facts.pop("crc32")
    save_tensors(path, tensors(load_file(file)), {key: value for key, value in facts.items() if value is not None})
    return path


SHAPE = {"coarse": 8, "width": 8, "fine": 4, "levels": 5, "affinities": 3}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"shape": None}, "no boundary head: its metadata has no 'shape'"),
        ({"sides": None}, "no 'sides'"),
        ({"trained": None}, "no 'trained'"),
        ({"shape": "{"}, "'shape' in the metadata of .* is truncated or not JSON"),
        ({"shape": "[" * 10_000}, "not JSON"),
        ({"shape": "3"}, "damaged or of another kind"),
        ({"shape": json.dumps({**SHAPE, "width": 2**40})}, "damaged or of another kind|expected floats"),
        ({"shape": json.dumps({**SHAPE, "width": 30_000})}, "expected floats"),
        ({"shape": json.dumps({**SHAPE, "width": -1})}, "damaged or of another kind"),
        ({"shape": json.dumps({**SHAPE, "depth": 1})}, "damaged or of another kind"),
        ({"shape": json.dumps({**SHAPE, "coarse": 16})}, "expected floats"),
        ({"sides": '["x"]'}, "damaged or of another kind"),
        ({"sides": "5"}, "damaged or of another kind"),
        ({"trained": "7"}, "damaged or of another kind"),
    ],
)
def test_metadata_that_lie_are_found(random_head_file: Path, tmp_path: Path, metadata: dict, message: str) -> None:
    with pytest.raises(BadFileError, match=message) as error:
        load_head(changed(random_head_file, tmp_path / "head.safetensors", **metadata))
    assert "\n" not in str(error.value) and "superpixels train" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: value for name, value in t.items() if "enlarge" not in name}, "'enlarge.bias' is missing"),
        (lambda t: {**t, "extra": torch.zeros(2)}, "'extra' is missing or odd"),
        (lambda t: {**t, "spread.bias": torch.zeros(3)}, r"'spread.bias' is \(3,\)"),
        (lambda t: {**t, "spread.bias": torch.zeros(16, dtype=torch.int64)}, "int64"),
        (lambda t: {**t, "spread.bias": torch.full((16,), float("nan"))}, "NaN or infinite"),
        (lambda t: {**t, "spread.bias": torch.full((16,), 1e300, dtype=torch.float64)}, "NaN or infinite"),
        (lambda t: {"x": torch.zeros(1)}, "missing or odd"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    random_head_file: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    with pytest.raises(BadFileError, match=message) as error:
        load_head(changed(random_head_file, tmp_path / "head.safetensors", change))
    assert "\n" not in str(error.value)


def test_half_precision_is_taken(random_head_file: Path, tmp_path: Path) -> None:
    half = changed(random_head_file, tmp_path / "half", lambda t: {name: value.half() for name, value in t.items()})
    assert {value.dtype for value in load_head(half).head.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "other", "folder", "plain"])
def test_damaged_files_are_one_line(random_head_file: Path, tmp_path: Path, kind: str) -> None:
    path, content = tmp_path / "head.safetensors", bytearray(random_head_file.read_bytes())
    if kind == "folder":
        path.mkdir()
    elif kind == "plain":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        content[-5] ^= 1 if kind == "flipped" else 0
        path.write_bytes({"cut": content[:-9], "empty": b"", "other": b"\x89PNG" * 50}.get(kind, bytes(content)))
    with pytest.raises(BadFileError) as error:
        load_head(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
