"""docs/hosts.md and the README: their Python runs, word for word but for the model's name and SAM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lavis_svp.hosts import swap_projector
from lavis_svp.projectors import PatchFeatures, Superpixels

ROOT = Path(__file__).resolve().parents[2]


def python_of(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    ("host", "blocks", "name"),
    [
        ("llava", slice(0, 4), "llava-hf/llava-1.5-7b-hf"),
        ("llava_next", slice(4, 5), "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ("qwen", slice(5, 6), "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_the_snippets_of_transformers_hosts(request, host, blocks, name, image, tmp_path, monkeypatch):
    original = request.getfixturevalue(host)
    for part in original:
        part.save_pretrained(tmp_path / "host")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(python_of("docs/hosts.md")[blocks])
    assert f'"{name}"' in code
    code = code.replace(f'"{name}"', f'"{tmp_path / "host"}"')
    code = code.replace('processor, "svp"', 'processor, "svp", superpixels={"name": "felzenszwalb"}')
    names = {"images": [image(seed) for seed in range(3)]}
    exec(compile(code, "docs/hosts.md", "exec"), names)
    model = names["model"]
    assert model.config.svp["name"] == "svp" and model.config.model_type == f"svp_{original[0].config.model_type}"
    if host == "llava":
        trainable = {key.split(".")[1] for key, p in model.named_parameters() if p.requires_grad}
        assert trainable == {"multi_modal_projector"}


def test_projectors_of_cells_fit_qwen_with_the_documented_options(qwen):
    for name, options in (("token_packer", {"scale": 2, "levels": [1, 2]}), ("pixel_shuffle", {"ratio": 2})):
        model, _ = swap_projector(*qwen, name, **options)
        assert model.model.visual.merger.name == name


def test_the_readmes_lines(llava):
    code = next(block for block in python_of("README.md") if "swap_projector" in block)
    features = PatchFeatures.whole(torch.zeros(1, 576, 1024), (24, 24))
    superpixels = Superpixels.from_masks([torch.ones(2, 24, 24)], features.grids, mask_size=16)
    names = {"model": llava[0], "processor": llava[1], "features": features, "superpixels": superpixels}
    exec(compile(code, "README.md", "exec"), names)
    assert names["visual"].tokens.shape == (1, 2, 4096)
    assert names["model"].config.svp["name"] == "svp" and names["model"] is not llava[0]
