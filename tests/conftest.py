"""What all tests share: one thread, no network, the embedded weights, a cache folder of one's own."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, so that a red test is red again; `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Before anything imports torch or transformers. One thread: the workers share the cores, and sums keep their order.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ[_name] = _value


def is_loopback(address: Any) -> bool:
    """Does a socket address stay on this machine? Names other than localhost count as outside."""
    if not isinstance(address, tuple):
        return True  # a UNIX socket's path
    host = str(address[0])
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def autograd_without_threads() -> None:
    """Let autograd settle on no threads of its own, as it does at the first backward where there is only the CPU.

    ``FakeTensorMode``, which the plan uses, pretends that there is a CUDA device. A first backward after it would
    start a thread for that device, and from then on no forked child could run a backward. See torch's
    ``_ensureCUDADeviceGuardSet`` and https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork.
    """
    import torch

    torch.zeros((), requires_grad=True).backward()


@pytest.fixture(autouse=True, scope="session")
def closed_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine, so that a test cannot need one unnoticed."""
    originals = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if not is_loopback(address):
                raise ConnectionRefusedError(f"Tests run offline, but this one connects to {address!r}.")
            return original(self, address)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        for name, original in originals.items():
            patch.setattr(socket.socket, name, guarded(original))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep torch to one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def weights() -> Callable[[str], Path]:
    """``weights(name)``: the folder of embedded weights, as set-up fetched them (fetched now if it did not run)."""
    from lavis_svp import zoo

    return lambda name: zoo.fetch(name, progress=False)


@pytest.fixture(scope="session")
def random_head(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a small boundary head with random weights, for MobileSAM's embeddings."""
    import torch

    from lavis_svp.superpixels.one_pass.head import BoundaryHead
    from lavis_svp.superpixels.one_pass.weights import HeadFacts, save_head

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_head(path, BoundaryHead(coarse=8, width=8, fine=4, affinities=2), HeadFacts("tiny_vit", (128,)))
    return str(path)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone; returns what ``cache_root()`` then is."""
    from lavis_svp.common.paths import cache_root

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, weights: Callable[[str], Path]) -> Path:
    """Folder of a random two-layer Llama of width 32 with SmolLM2's real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = AutoTokenizer.from_pretrained(weights("smollm2_135m_instruct"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Folder of a random Llama whose matrices hold whole blocks of 64 numbers, as bitsandbytes wants them on a CPU."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide_llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    eos = tokenizer.eos_token_id
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=eos, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as Vicuna, GLaMM and LISA ship it: ``tokenizer.model`` with byte fallback, no ``tokenizer.json``."""
    import json

    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = "A chat between a curious human and an artificial intelligence assistant about the red cup on the left."
    (folder / "text.txt").write_text("\n".join([text, *text.split()] * 20))
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    for leftover in ("text.txt", "tokenizer.vocab"):
        (folder / leftover).unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}))
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "<unk>"}))
    return folder


def _module_beside(name: str) -> Any:
    """A file beside this one as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_refcoco() -> Any:
    """The script ``tests/fake_refcoco.py`` as a module: ``fake_refcoco.make_tree(root, references, seed)``."""
    return _module_beside("fake_refcoco")


@pytest.fixture(scope="session")
def refcoco_family(fake_refcoco: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with small RefCOCO, RefCOCO+ and RefCOCOg; some training images of each are held out in another."""
    root: Path = fake_refcoco.make_tree(tmp_path_factory.mktemp("family"), references=120)
    return root


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """Random parts of a whole svp_ris: a Llama and a DINOv2 of width 32 (SAM is MobileSAM at side 128)."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_dinov2")
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    ).save_pretrained(folder)
    return {"llama": tiny_llama, "dinov2": folder}


@pytest.fixture(scope="session")
def make_model(tiny_parts: dict[str, Path], random_head: str) -> Callable[..., Any]:
    """``make_model(**sections)``: a fresh model in training mode; sections override the tiny defaults.

    The head of ``one_pass`` is a random one.
    """
    import torch
    from omegaconf import OmegaConf

    def build(**sections: Any) -> Any:
        from lavis_svp.models.svp_ris import SvpRis

        base = {
            "vision_encoder": {"name": str(tiny_parts["dinov2"]), "side": 84},
            "sam": {"side": 128},
            "superpixels": {"name": "grid", "rows": 3, "cols": 3},
            "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
            "language": {"name": str(tiny_parts["llama"]), "tuning": "full", "train_embeddings": "added"},
            "prompt": {"style": "plain"},
            "layout": "packed",
        }
        for whole in ("projector", "superpixels"):  # other names have other options
            if whole in sections:
                base.pop(whole)
        if sections.get("superpixels", {}).get("name") == "one_pass":
            base["superpixels"] = {"head": random_head}
        torch.manual_seed(0)
        return SvpRis.from_config(OmegaConf.merge(base, sections)).train()

    return build


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two images, one of them not square, with three and one expressions; one has no target."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    sizes, inside = [(96, 128), (128, 128)], [(96, 128), (128, 128)]
    image = torch.zeros(2, 4, 128, 128)
    masks = []
    for index, (height, width) in enumerate(inside):
        image[index, :3, :height, :width] = torch.rand(3, height, width, generator=torch.Generator().manual_seed(index))
        image[index, 3, :height, :width] = 1
        mask = np.zeros(sizes[index], np.uint8)
        top, left = rng.integers(5, 40, 2)
        mask[top : top + 30, left : left + 40] = 1
        masks.append(mask)
    return {
        "image": image,
        "original_size": sizes,
        "text_input": [["the red cup", "a cat", "the large blue star on the left"], ["the circle"]],
        "masks": [[masks[0], np.zeros_like(masks[0]), masks[0]], [masks[1]]],
        "has_target": [[True, False, True], [True]],
        "instances": [{"labels": m.astype(np.int32) - 1, "words": [["red", "cup"]]} for m in masks],
    }


@pytest.fixture(scope="session")
def devices() -> Any:
    """The helper ``tests/devices.py`` as a module: ``with devices.LogicalCuda() as cuda: ...``."""
    return _module_beside("devices")
