"""What a user types, and what a checkpoint says: YAML files, --options, the configuration stored in a checkpoint."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.damage import as_json, damaged_bytes, damaged_tree, deep_json, odd_values
from tests.fuzz.files import Files, listed, odd_places
from tests.fuzz.outcomes import Case, Target

PROJECT = Path(__file__).parents[2] / "projects/svp/train/refshapes_tiny.yaml"
YAML = "project.yaml"
CHECKPOINT = "checkpoint_8.pth"
MARK = "hostile_mark"
SECRET = "SECRET_OF_THE_FUZZ_TEST"
DEEP = 200_000


def build(folder: Path) -> list[Target]:
    """All targets of settings."""
    import lavis_svp  # noqa: F401  (registers everything with LAVIS)

    folder = folder / "settings"
    folder.mkdir(parents=True)
    (folder / YAML).write_text(PROJECT.read_text())
    files = Files(folder)
    return [
        *_yaml(files), _options(files), _own_options(), *_deepspeed(folder / "deepspeed"),
        *_stored(folder / "checkpoint"),
    ]  # fmt: skip


def as_command(read: Callable[[], Any]) -> Any:
    """What a command makes of it: it ends with one line for the errors that it expects, and lets others through."""
    from lavis_svp.cli.common import USER_ERRORS
    from lavis_svp.common.files import BadFileError

    try:
        return read()
    except USER_ERRORS as error:
        raise BadFileError(str(error)) from error


def _config(path: Path, options: Sequence[str] = ()) -> Any:
    """The whole configuration of a run."""
    from omegaconf import OmegaConf

    from lavis_svp.runners.project import build_config, read_project

    def read() -> Any:
        return OmegaConf.to_container(build_config(read_project(path, options)).config, resolve=True)

    return as_command(read)


def _yaml(files: Files) -> list[Target]:
    import yaml

    path = files.path(YAML)
    tree = yaml.safe_load(PROJECT.read_text())
    read = functools.partial(_config, path)

    def intact() -> Any:
        files.place({})
        return read()

    def fields(rng: random.Random, number: int) -> Case:
        def odd() -> list[Any]:
            return [*odd_values(), "${oc.env:HOME}", "${run.seed}", "${run.output_dir}", "???", "auto", "1e3", "0x10"]

        changed, label = damaged_tree(tree, rng, odd)
        return files.case(label, {YAML: yaml.safe_dump(changed).encode("utf-8", "replace")}, read, ())

    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    texts: dict[str, bytes] = {
        "lists": b"[" * DEEP, "mappings": b"{a: " * DEEP, "block lists": b"- " * DEEP, "block mappings": b"? " * DEEP,
        "indented": b"".join(b" " * depth + b"a:\n" for depth in range(3000)), "a billion laughs": laughs.encode(),
        "an alias of itself": b"a: &a [*a]\nmodel: *a\n", "an unknown alias": b"model: *x\n", "nothing": b"",
        "a text": b"x",
        "a list": b"[1]", "a number": b"5", "null": b"null\n", "two documents": b"a: 1\n---\nb: 2\n",
        "a tab": b"\tmodel: 1",
        "NUL": b"model: \0", "UTF-16": "model: 1".encode("utf-16"), "Latin-1": b"model: \xe9",
        "binary": bytes(range(256)),
        "a key that is a list": b"? [1]\n: 2\n", "a key that is null": b"~: 1\n", "keys that are numbers": b"1: 2\n",
        "a doubled key": b"model: 1\nmodel: 2\n", "merge": b"<<: [1]\n", "merge of itself": b"a: &a\n  <<: *a\n",
        "a long text": b"model: " + b"x" * 12_000_000, "a date": b"model: 2026-01-01\nrun: {}\ndatasets: {}\n",
        "binary tag": b"model: !!binary x\n", "set": b"model: !!set {a}\n", "omap": b"model: !!omap [a: 1]\n",
    }  # fmt: skip
    for tag in (
        "object/apply:os.system [touch canary]", "object/new:os.system [touch canary]", "name:os.system",
        "module:os", "object:os.system {}", "object/apply:builtins.open [canary, w]", "tuple [1]",
    ):  # fmt: skip
        for key in ("model", "run", "datasets"):
            texts[f"!!python/{tag} as {key}"] = f"{key}: !!python/{tag}\n".encode()
    text = PROJECT.read_text()
    for value in ("${oc.env:HOME}", "${oc.env:NO_SUCH}", "${run.output_dir}", "${", "${a", "${x:y}", "${oc.decode:1}",
                  "${oc.create:{a: 1}}", "${.}", "${..}", "${run}", "${model.arch}${model.arch}"):  # fmt: skip
        texts[f"output_dir: {value}"] = text.replace("output/svp/refshapes_tiny", f'"{value}"').encode()
        texts[f"arch: {value}"] = text.replace("arch: svp_ris", f'arch: "{value}"').encode()
    cases = [files.case(label, {YAML: content}, read, ()) for label, content in texts.items()]
    for what, place in odd_places(files.folder / "elsewhere").items():
        cases.append(files.case(what, {YAML: place}, read, (YAML,)))
    return [
        Target("YAML: bytes", 250, files.damaged(YAML, read, damaged_bytes, ()), intact=intact),
        Target("YAML: fields", 350, fields, intact=intact),
        listed("YAML: tags, aliases, nesting, ${...}", cases),
    ]


def _options(files: Files) -> Target:
    """``--options``: given ones, then odd values for the keys of the project."""
    import yaml

    path = files.path(YAML)
    values = (
        "", "null", "[]", "{}", "[", "{", "${", "${oc.env:HOME}", "${run.seed}", "${x",
        "!!python/object/apply:os.system [id]",
        "[" * 500, "[" * 50_000, "{a: " * 50_000, "1e999", "-1", "0", "nan", ".inf", "'", '"', "\\", "a=b", "../x",
        "/etc",
        "\ud800", "\0", "\n", "x" * 10_000, "9" * 5000, "0x" + "f" * 5000, "[1,2", "1:2", "&a [*a]", "*a", "true", "é",
    )  # fmt: skip
    words: list[list[str]] = [
        ["run.seed"], ["run.seed", "1"], ["run.seed", "1", "2"], ["=1"], ["="], [".=1"], ["..=1"], ["run..seed=1"],
        ["run.=1"], [".run=1"], ["run[0]=1"], ["run[seed]=1"], ["run.seed.x=1"], ["run.seed.x.y=1"], ["run=1"],
        ["run=null"],
        ["model=[]"], ["datasets={}"], ["datasets=null"], ["model.projector=svp"], ["model.projector=[]"], ["a.b.c=1"],
        ["run.test_splits.val=1"], ["run.test_splits.0=1"], ["run.test_splits[0]=1"], ["run.test_splits[9]=1"],
        ["run.eval=1"], ["run.eval.mode=[]"], ["datasets.x.type=1"], ["datasets.refshapes_seg=null"], ["0=1"], ["-1=1"],
        ["é=1"], ["\0=1"], ["run.\ud800=1"], [""], [" "], ["run.seed=1", ""], ["model.arch="], ["model.arch=None"],
        ["model.model_type=../x"], ["run.task=__import__"], ["run.runner=x"], ["run.device=cuda:99"], ["run.device=x"],
        ["model.language.name=../../x"], ["model.sam.side=5"], ["model.superpixels.name=x"], ["model.projector.name=x"],
        ["x" * 10_000 + "=1"], [".".join(["a"] * 5000) + "=1"], ["[" * 1000 + "=1"], ["run.output_dir=\0"],
    ]  # fmt: skip
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(yaml.safe_load(PROJECT.read_text()), "")

    def case(rng: random.Random, number: int) -> Case:
        chosen = words[number] if number < len(words) else [f"{rng.choice(keys)}={rng.choice(values)}"]
        return files.case(" ".join(chosen)[:80], {}, functools.partial(_config, path, chosen), ())

    return Target("--options", len(words) + 300, case)


def _own_options() -> Target:
    """Options of ``lavis-svp superpixels``."""
    from lavis_svp.cli.superpixels import parse_options

    texts = ["a", "=", "a=", "a=[", "a=" + "[" * DEEP, "a=" + "{a: " * DEEP,
    "a=!!python/object/apply:os.system [touch canary]",
             "a=&a [*a]", "a=*b", "a=\0", "a=${oc.env:HOME}", "a=\ud800", "a=" + "- " * DEEP]  # fmt: skip

    def kinds_of(text: str) -> Any:  # a list may hold itself
        return {name: type(value).__name__ for name, value in parse_options([text]).items()}

    cases = [Case(text[:60], functools.partial(as_command, functools.partial(kinds_of, text))) for text in texts]
    return listed("options of superpixels", cases)


def _deepspeed(folder: Path) -> list[Target]:
    """The JSON that ``run.deepspeed_config`` names."""
    from lavis_svp.runners.deepspeed_config import read_config

    folder.mkdir()
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}}
    (folder / "ds.json").write_bytes(as_json(config))
    files = Files(folder)

    def read() -> Any:
        return as_command(lambda: read_config(str(folder / "ds.json"), folder / YAML))

    cases = [files.case(label, {"ds.json": content}, read, ("ds.json",)) for label, content in deep_json()]
    cases += [files.case(what, {"ds.json": place}, read, ("ds.json",)) for what, place in odd_places(folder).items()]
    damaged = files.damaged("ds.json", read, damaged_bytes)
    return [Target("DeepSpeed's configuration: bytes", 100, damaged), listed("DeepSpeed's configuration: JSON", cases)]


def _stored(folder: Path) -> list[Target]:
    """``evaluate --checkpoint FILE``: the configuration in the file gives names, and no places."""
    import io
    import os

    import torch
    from omegaconf import OmegaConf

    from lavis_svp.common.checkpoints import content_digest
    from lavis_svp.runners.project import build_config, config_to_evaluate, read_project

    os.environ[SECRET] = MARK
    folder.mkdir()
    config = OmegaConf.to_container(build_config(read_project(PROJECT)).config, resolve=True)
    base = {"model": {"w": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": []}, "scaler": None, "iters": 8}

    def checkpoint(config: Any) -> bytes:
        buffer = io.BytesIO()
        contents = {**base, "config": config}
        torch.save({**contents, "digest": content_digest(contents)}, buffer)
        return buffer.getvalue()

    (folder / CHECKPOINT).write_bytes(checkpoint(config))
    files = Files(folder)
    fine = "nothing of it is obeyed"

    def read() -> Any:
        def evaluate() -> Any:
            _, made = config_to_evaluate(None, folder / CHECKPOINT, [])
            return OmegaConf.to_container(made.config, resolve=True)

        return as_command(evaluate)

    def intact() -> Any:
        files.place({})
        return read()

    def obeyed() -> Any:
        content = json.dumps(read(), default=str)
        return fine if MARK not in content else f"{MARK} is in the configuration"

    def changed(path: str, value: Any) -> Any:
        tree = json.loads(json.dumps(config))
        node: Any = tree
        *parents, last = path.split(".")
        for name in parents:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[last] = value
        return tree

    data = "datasets.refshapes_seg"
    cases = []
    for path in (
        "run.output_dir", "run.resume", "run.resume_ckpt_path", "run.dist_url", "run.log_to", "run.wandb_project",
        "run.deepspeed_config", f"{data}.build_info.root", f"{data}.build_info.images.storage", f"{data}.data_dir",
        f"{data}.build_info.annotations.train.storage", f"{data}.build_info.annotations.train.url",
        f"{data}.build_info.url",
        f"{data}.build_info.shards", f"{data}.sampling.x", "run.eval.output", "run.x",
    ):  # fmt: skip
        for value in (f"/{MARK}", f"../{MARK}", f"${{oc.env:{SECRET}}}", f"http://127.0.0.1/{MARK}", [f"/{MARK}"]):
            content = checkpoint(changed(path, value))
            label = f"{path} = {value}"
            cases.append(
                files.case(label, {CHECKPOINT: content}, obeyed, (CHECKPOINT, path.rpartition(".")[2]), expected=fine)
            )
    for path in (
        "model.arch",
        "model.language.name",
        "model.finetuned",
        "run.task",
        "run.seed",
        "model.x",
        f"{data}.type",
    ):
        for value in (f"${{oc.env:{SECRET}}}", "${run.seed}", "${", "${x:y}"):
            label, content = f"{path} = {value}", checkpoint(changed(path, value))
            cases.append(files.case(label, {CHECKPOINT: content}, obeyed, (CHECKPOINT, path), expected=fine))

    def fields(rng: random.Random, number: int) -> Case:
        tree, label = damaged_tree(config, rng, lambda: [one for one in odd_values() if one != "\ud800"])
        return files.case(label, {CHECKPOINT: checkpoint(tree)}, read, ())

    return [
        Target("configuration in a checkpoint: fields", 300, fields, intact=intact),
        listed("configuration in a checkpoint: places, ${...}", cases),
    ]
