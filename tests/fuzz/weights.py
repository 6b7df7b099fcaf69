"""Readers of files of weights: safetensors and torch's, checkpoints, projectors; harmful pickles for all of them."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.damage import as_json, damaged_bytes, damaged_tree, deep_json, flipped, odd_values
from tests.fuzz.files import Files, listed, odd_places, warnings_are_errors
from tests.fuzz.outcomes import Case, Target
from tests.fuzz.payloads import PROTOCOLS, calls, raw, wrapped

Read = Callable[[Path], Any]
OPTIMIZER = {"state": {0: {"step": 4.0}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
LENGTH = 8  # bytes of the length of a safetensors header


def build(folder: Path) -> list[Target]:
    """All targets of weights."""
    import lavis_svp  # noqa: F401  (registers everything with LAVIS)

    canary, folder = folder / "canary", folder / "weights"
    folder.mkdir(parents=True)
    return [
        *_safetensors(folder / "safetensors"),
        *_torch_files(folder / "torch"),
        *_checkpoints(folder / "checkpoints"),
        *_projectors(folder / "projectors"),
        *_pickles(folder / "pickles", canary),
    ]


def tensors() -> dict[str, Any]:
    """A few tensors under names that every reader of plain states takes."""
    import torch

    torch.manual_seed(0)
    return {
        "image_encoder.weight": torch.randn(6, 5),
        "mask_decoder.bias": torch.randn(7),
        "prompt_encoder.count": torch.arange(3),
        "model.half": torch.randn(4, 4).half(),
    }


def state_readers() -> dict[str, Read]:
    """Every function that reads somebody's state dict from a path."""
    from lavis_svp.common.tensor_files import load_state
    from lavis_svp.models.checkpoint import read_weights
    from lavis_svp.vision.sam import read_state_dict
    from lavis_svp.zoo import glamm

    readers: dict[str, Read] = {"load_state": load_state, "SAM": read_state_dict, "model.pretrained": read_weights}
    if hasattr(glamm, "read_tensors"):
        readers["GLaMM"] = glamm.read_tensors
    return readers


def placed(files: Files, read: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        files.place({})
        return read()

    return run


# -------------------------------------------------------------------------------------------------- safetensors


def _safetensors(folder: Path) -> list[Target]:
    from safetensors.torch import save_file

    from lavis_svp.common.tensor_files import save_tensors

    folder.mkdir()
    save_file(tensors(), folder / "foreign.safetensors", {"format": "pt"})
    save_tensors(folder / "own.safetensors", tensors(), {"model": "{}"})
    files = Files(folder)
    targets = []
    for name, read in state_readers().items():
        foreign = functools.partial(read, folder / "foreign.safetensors")
        targets.append(
            Target(
                f"safetensors, {name}: bytes", 200, files.damaged("foreign.safetensors", foreign, damaged_bytes),
                intact=placed(files, foreign),
            )
        )  # fmt: skip
    own = functools.partial(state_readers()["load_state"], folder / "own.safetensors")
    one_bit = files.damaged("own.safetensors", own, lambda content, rng: (flipped(content, rng), "one bit"))
    targets.append(Target("safetensors with a checksum: one bit", 300, one_bit, summed=True, intact=placed(files, own)))
    headers = [
        files.case(f"{name}: {label}", {"foreign.safetensors": content}, functools.partial(
            read, folder / "foreign.safetensors"), ("foreign.safetensors",))
        for name, read in {**state_readers(), **_metadata_readers()}.items()
        for label, content in _headers().items()
    ]  # fmt: skip
    places = [
        files.case(f"{name}: {what}", {"foreign.safetensors": place}, functools.partial(
            read, folder / "foreign.safetensors"), ("foreign.safetensors",))
        for name, read in {**state_readers(), **_metadata_readers()}.items()
        for what, place in odd_places(folder / "own.safetensors").items()
    ]  # fmt: skip
    return [*targets, listed("safetensors: headers", headers), listed("safetensors: odd places", places)]


def _metadata_readers() -> dict[str, Read]:
    from lavis_svp.common.checkpoints import read_metadata
    from lavis_svp.projectors.io import load_projector
    from lavis_svp.segmentation.no_target import stored_calibration
    from lavis_svp.superpixels.one_pass.labels import read_record
    from lavis_svp.superpixels.one_pass.weights import load_head

    def projector(path: Path) -> Any:
        return dict(load_projector(path).state_dict())

    return {
        "metadata": read_metadata, "calibration": stored_calibration, "projector": projector,
        "boundary head": lambda path: dict(load_head(path).head.state_dict()),
        "record of a head": lambda path: read_record(path, [64]).images,
    }  # fmt: skip


def _headers() -> dict[str, bytes]:
    """Safetensors files whose header lies."""
    data = bytes(64)

    def with_header(header: bytes, length: int | None = None) -> bytes:
        return (len(header) if length is None else length).to_bytes(LENGTH, "little") + header + data

    def entry(**values: Any) -> bytes:
        return with_header(as_json({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **values}}))

    two = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {
        "a length of 2^63": with_header(b"{}", 2**63),
        "a length of 2^64 - 1": with_header(b"{}", 2**64 - 1),
        "a length of 100 MB": with_header(b"{}", 100_000_000),
        "a length of zero": with_header(b"{}", 0),
        "one byte": b"\0",
        "seven bytes": bytes(7),
        "nested": with_header(b"[" * 50_000 + b"]" * 50_000),
        "nested mappings": with_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        "a list": with_header(b"[]"),
        "null": with_header(b"null"),
        "no tensors": with_header(b"{}"),
        "an unknown type": entry(dtype="F33"),
        "a type that is a number": entry(dtype=5),
        "a shape that overflows": entry(shape=[2**32, 2**32, 2**32]),
        "a negative shape": entry(shape=[-4, -4]),
        "a shape of fractions": entry(shape=[1.5]),
        "another shape": entry(shape=[5, 5]),
        "no shape": entry(shape=None),
        "offsets beyond the end": entry(data_offsets=[0, 2**40]),
        "offsets turned round": entry(data_offsets=[64, 0]),
        "negative offsets": entry(data_offsets=[-64, 0]),
        "one offset": entry(data_offsets=[0]),
        "offsets that overlap": with_header(as_json({"a": two, "b": two})),
        "a gap": with_header(as_json({"a": two, "b": {**two, "data_offsets": [32, 48]}})),
        "metadata that is a list": with_header(as_json({"__metadata__": [], "a": two})),
        "metadata of numbers": with_header(as_json({"__metadata__": {"a": 1}, "a": two})),
        "metadata for us": with_header(
            as_json({"__metadata__": {"model": "[" * 20_000, "no_target": "{", "crc32": "zz"}, "a": two})),
        "a doubled name": with_header(b'{"a":' + as_json(two) + b',"a":' + as_json(two) + b"}"),
        "a name with a NUL": with_header(as_json({"a\0b": {**two, "data_offsets": [0, 16]}})),
        "a surrogate": with_header(b'{"\\ud800":' + as_json(two) + b"}"),
        "not UTF-8": with_header(b'{"\xff":1}'),
        "an empty shape": entry(shape=[], data_offsets=[0, 4]),
        "a shape with zero": entry(shape=[0, 2**60], data_offsets=[0, 0]),
        "4-bit floats": entry(dtype="F4", shape=[128]),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ torch's files


def _torch_files(folder: Path) -> list[Target]:
    import torch

    folder.mkdir()
    torch.save(tensors(), folder / "zip.pth")
    torch.save(tensors(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    files = Files(folder)
    targets = []
    for name, read in state_readers().items():
        if name == "model.pretrained":
            continue  # reads whole checkpoints, below
        for kind, count in (("zip", 200), ("legacy", 120)):
            one = functools.partial(read, folder / f"{kind}.pth")
            targets.append(
                Target(
                    f"{kind} .pth, {name}: bytes", count, files.damaged(f"{kind}.pth", one, damaged_bytes),
                    intact=placed(files, one),
                )
            )  # fmt: skip
    contents = {
        "a list": [1, 2], "a tensor": torch.ones(2), "numbers": {"a": 1}, "nested": {"a": {"b": torch.ones(1)}},
        "nothing": {}, "keys that are numbers": {1: torch.ones(1)}, "a text": "x",
        "sparse": {"a": torch.eye(3).to_sparse()},
        "a view of a large storage": {"a": torch.zeros(100)[:1]}, "meta": {"a": torch.ones(1, device="meta")},
        "complex": {"a": torch.ones(2, dtype=torch.complex64)}, "empty": {"a": torch.empty(0)},
    }  # fmt: skip
    cases = []
    for name, read in state_readers().items():
        if name == "model.pretrained":
            continue
        for label, content in contents.items():
            change = {"zip.pth": _saved(content)}
            cases.append(
                files.case(f"{name}: {label}", change, functools.partial(read, folder / "zip.pth"), ("zip.pth",))
            )
        for what, place in odd_places(folder / "legacy.pth").items():
            one = functools.partial(read, folder / "zip.pth")
            cases.append(files.case(f"{name}: {what}", {"zip.pth": place}, one, ("zip.pth",)))
    return [*targets, listed(".pth: odd contents and places", cases)]


def _saved(content: Any, **options: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------- checkpoints


def _checkpoints(folder: Path) -> list[Target]:
    import torch

    from lavis_svp.common.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint

    folder.mkdir()
    contents = {
        "model": tensors(),
        "optimizer": OPTIMIZER,
        "scaler": None,
        "config": {"model": {"arch": "x"}},
        "iters": 4,
    }
    save_checkpoint(folder / "checkpoint_8.pth", contents)
    torch.save(contents, folder / "older.pth")
    (folder / "run").mkdir()
    save_checkpoint(folder / "run" / "checkpoint_4.pth", contents)
    save_checkpoint(folder / "run" / "checkpoint_8.pth", {**contents, "iters": 8})
    files = Files(folder)

    def read(name: str) -> Any:
        return read_checkpoint(folder / name)

    @warnings_are_errors
    def newest() -> Any:
        path = newest_checkpoint(folder / "run")
        return None if path is None else path.name

    def resumable() -> Any:
        from lavis_svp.runners.resume import read_resumable

        return read_resumable(folder / "checkpoint_8.pth")

    def fields(rng: random.Random, number: int) -> Case:
        def odd() -> list[Any]:
            return [one for one in odd_values() if one != "\ud800"]

        changed, label = damaged_tree({**contents, "model": {"a": [1.0]}}, rng, odd)
        if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
            changed["model"] = {name: torch.ones(1) for name in changed["model"]}
        return files.case(label, {"checkpoint_8.pth": _saved(changed)}, resumable, ("checkpoint_8.pth",))

    rows = {"with its digest": ("checkpoint_8.pth", True), "of release 0.1": ("older.pth", False)}
    targets = [
        Target(
            f"checkpoint {what}: bytes", 300, files.damaged(name, functools.partial(read, name), damaged_bytes),
            intact=placed(files, functools.partial(read, name)), summed=summed,
        )
        for what, (name, summed) in rows.items()
    ]  # fmt: skip
    passed_over = files.damaged("run/checkpoint_8.pth", newest, damaged_bytes)
    return [
        *targets,
        Target("checkpoint: entries, resumed", 250, fields),
        Target("checkpoints of a folder: the newest damaged", 100, passed_over, intact=placed(files, newest)),
    ]


# --------------------------------------------------------------------------------------------------- projectors


def _projectors(folder: Path) -> list[Target]:
    from lavis_svp.hosts.llava_original import load_mm_projector, save_mm_projector
    from lavis_svp.projectors import build_projector
    from lavis_svp.projectors.io import load_projector, save_projector

    folder.mkdir()
    projector = build_projector("mlp", vision_dim=4, llm_dim=6, grid=(2, 2))
    save_projector(folder / "projector.safetensors", projector)
    save_mm_projector(folder / "mm_projector.bin", projector)
    files = Files(folder)
    own, theirs = folder / "projector.safetensors", folder / "mm_projector.bin"

    def read() -> Any:
        return dict(load_projector(own).state_dict())

    def read_theirs() -> Any:
        target = build_projector("mlp", vision_dim=4, llm_dim=6, grid=(2, 2))
        load_mm_projector(theirs, target)
        return dict(target.state_dict())

    from safetensors import safe_open

    with safe_open(own, "pt") as file:
        metadata = dict(file.metadata())
    (key,) = [name for name, value in metadata.items() if value.startswith("{")]
    settings = json.loads(metadata[key])

    def with_settings(text: str) -> bytes:
        from safetensors.torch import save

        return save(
            {name: value.contiguous() for name, value in projector.state_dict().items()}, {**metadata, key: text}
        )

    def fields(rng: random.Random, number: int) -> Case:
        changed, label = damaged_tree(settings, rng)
        return files.case(label, {own.name: with_settings(json.dumps(changed))}, read, (own.name,))

    nested = [
        files.case(label, {own.name: with_settings(content.decode("latin1"))}, read, (own.name,))
        for label, content in deep_json()
        if "BOM" not in label and "UTF" not in label and "NUL" not in label
    ]
    import torch

    state = {f"model.{name}": value for name, value in torch.load(theirs, weights_only=True).items()}
    odd = [
        files.case(label, {theirs.name: _saved(content)}, read_theirs, (theirs.name,))
        for label, content in {
            "other names": {"x.mm_projector.a": torch.ones(1)}, "no tensors": {}, "a list": [],
            "keys of numbers": {5: torch.ones(1)},
            "another shape": {name: value[:1] for name, value in state.items()},
            "integers": {name: value.long() for name, value in state.items()},
        }.items()
    ]  # fmt: skip
    summed = "crc32" in metadata
    return [
        Target("projector: bytes", 250, files.damaged(own.name, read, damaged_bytes), intact=placed(files, read),
               summed=summed),
        Target("projector: its settings", 300, fields, intact=placed(files, read)),
        listed("projector: nested settings", nested),
        Target("LLaVA's projector: bytes", 200, files.damaged(theirs.name, read_theirs, damaged_bytes),
               intact=placed(files, read_theirs)),
        listed("LLaVA's projector: odd contents", odd),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ pickles


def _pickles(folder: Path, canary: Path) -> list[Target]:
    """Harmful pickles as references, and as weights of every kind for every reader."""
    from lavis_svp.common.checkpoints import read_checkpoint
    from lavis_svp.datasets.refcoco import load_plain_pickle, split_images
    from lavis_svp.hosts.llava_original import load_mm_projector
    from lavis_svp.projectors import build_projector

    folder.mkdir()
    (folder / "refs(unc).p").write_bytes(b"")
    (folder / "weights.pth").write_bytes(b"")
    files = Files(folder)
    refs, weights = folder / "refs(unc).p", folder / "weights.pth"
    of_refs: list[Case] = []
    of_weights: list[Case] = []
    by_hand = raw(canary)
    for label, content in by_hand.items():
        for read in (load_plain_pickle, split_images):
            one = functools.partial(_kind_of, read, refs)
            of_refs.append(files.case(f"{read.__name__}: {label}", {refs.name: content}, one, (refs.name,)))
    for label, payload in calls(canary).items():
        for place, wrapped_payload in wrapped(payload).items():
            for protocol in PROTOCOLS:
                change = {refs.name: pickle.dumps(wrapped_payload, protocol)}
                one = functools.partial(load_plain_pickle, refs)
                name = f"{label} {place}, protocol {protocol}"
                of_refs.append(files.case(name, change, one, (refs.name,), must_refuse=True))
    projector = build_projector("mlp", vision_dim=4, llm_dim=6, grid=(2, 2))
    readers: Mapping[str, Read] = {
        **state_readers(), "checkpoint": read_checkpoint, "LLaVA": lambda path: load_mm_projector(path, projector),
    }  # fmt: skip
    for reader, read in readers.items():
        one = functools.partial(read, weights)
        for label, payload in calls(canary).items():
            for form, content in _weights_with(payload).items():
                name = f"{reader}: {label}, {form}"
                of_weights.append(files.case(name, {weights.name: content}, one, (weights.name,), must_refuse=True))
        for label, content in by_hand.items():
            of_weights.append(files.case(f"{reader}: {label}", {weights.name: content}, one, (weights.name,)))
        for label, content in by_hand.items():
            change = {weights.name: _zip_around(content)}
            of_weights.append(files.case(f"{reader}: {label} in a zip", change, one, (weights.name,)))
    return [listed("harmful pickles: references", of_refs), listed("harmful pickles: weights", of_weights)]


def _kind_of(read: Read, path: Path) -> str:
    """What is read may be nested without end, which the fuzzer itself could not look through."""
    return type(read(path)).__name__


def _weights_with(payload: Any) -> dict[str, bytes]:
    state = {"model": {"a": payload}}
    objects, array = np.empty(1, dtype=object), io.BytesIO()
    objects[0] = payload
    np.save(array, objects, allow_pickle=True)
    return {
        "zip": _saved(state), "legacy": _saved(state, _use_new_zipfile_serialization=False),
        "zip, at the root": _saved(payload), "pickle 2": pickle.dumps(state, 2), "pickle 4": pickle.dumps(state, 4),
        "numpy": array.getvalue(),
    }  # fmt: skip


def _zip_around(content: bytes) -> bytes:
    """A torch archive whose pickle is this content."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()
