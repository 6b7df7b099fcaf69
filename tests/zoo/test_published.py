"""Hugging Face folders that are hostile or damaged: nothing in them runs, nothing is obeyed, and errors name them."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model

from lavis_svp.common.files import BadFileError
from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions, load_tokenizer
from lavis_svp.vision.backbone import build_vision_encoder
from lavis_svp.zoo import model_config


def language(folder):
    return LanguageModel(LanguageOptions(name=str(folder), tuning="frozen"))


def vision(folder):
    return build_vision_encoder(folder, 56)


LOADERS = {"language": language, "vision": vision}


@pytest.fixture(params=sorted(LOADERS))
def published(request, tmp_path, tiny_llama):
    """(a folder of a small model, the function that loads it)"""
    folder = tmp_path / "published"
    if request.param == "language":
        shutil.copytree(tiny_llama, folder)
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder, LOADERS[request.param]


def edit(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def refused(load, folder, match=None):
    with pytest.raises(BadFileError, match=match) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and "trust_remote_code" not in message


def canary(file, path):
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"open({str(path)!r}, 'w')\ndef generate(*a, **k): pass\nclass Own: pass\n")


def test_a_folder_with_code_for_generating_is_refused_and_not_run(published, tmp_path):
    """transformers 4.57 imports the file of a local folder whatever trust_remote_code says."""
    folder, load = published
    canary(folder / "custom_generate/generate.py", tmp_path / "it_ran")
    refused(load, folder, "never run")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("what", ["model", "tokenizer", "configuration"])
def test_a_model_that_needs_its_own_code_is_refused_and_nobody_is_asked(tmp_path, tiny_llama, monkeypatch, what):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(tiny_llama, tmp_path / "published")
    canary(folder / "own.py", tmp_path / "it_ran")
    if what == "tokenizer":
        edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
        refused(load_tokenizer, folder, "code of its own")
    else:
        edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
        refused({"model": vision, "configuration": model_config}[what], folder, "code of its own")
    assert not (tmp_path / "it_ran").exists()


def test_no_other_model_and_no_kernel_is_fetched(published):
    folder, load = published
    edit(folder / "config.json", attn_implementation="somebody/kernel")
    refused(load, folder, "names code to fetch")
    edit(folder / "config.json", attn_implementation="eager")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    refused(load, folder, "names another model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_is_refused(published, name):
    folder, load = published
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(load, folder, "FIFO")


def test_layers_without_end_are_refused(published):
    folder, load = published
    edit(folder / "config.json", num_hidden_layers=10**9)
    refused(load, folder, "num_hidden_layers is 1000000000")
    refused(model_config, folder, "num_hidden_layers is 1000000000")


def test_missing_tensors_do_not_become_random_ones(published):
    folder, load = published
    state = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(state) if name.endswith("norm.weight") or name.endswith("norm1.weight"))
    save_file({n: t for n, t in state.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    refused(load, folder, f"lacks 1 tensors.*{name}")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"model_type": "no_such"}', b""])
def test_a_damaged_configuration_is_named(published, content):
    folder, load = published
    (folder / "config.json").write_bytes(content)
    refused(load, folder)
    refused(model_config, folder)


def test_damaged_weights_are_named(published):
    folder, load = published
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], whole.replace(b'"F32"', b'"F99"', 1)):
        path.write_bytes(damaged)
        refused(load, folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 200_000, b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, tiny_llama, content):
    folder = shutil.copytree(tiny_llama, tmp_path / "published")
    (folder / "tokenizer.json").write_bytes(content)
    refused(load_tokenizer, folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny_llama):
    """Its words beyond the table had no row, and [SEG]'s score stood at another word's place."""
    folder = shutil.copytree(tiny_llama, tmp_path / "published")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>", "<and more>"])
    tokenizer.save_pretrained(folder)
    refused(language, folder, "do not belong together")


def test_what_transformers_cannot_find_stays_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="nobody/nothing") as caught:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        model_config(tmp_path)
