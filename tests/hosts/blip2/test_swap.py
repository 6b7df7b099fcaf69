"""Swapping into a BLIP-2 that LAVIS has built; LAVIS's classes, put together from tiny parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

GRID = {"name": "grid", "rows": 2, "cols": 3, "side": 56}


@pytest.fixture
def lavis_blip2(tiny_vit, opt_folder, t5_folder):
    """``lavis_blip2("opt")``: LAVIS's class with all that LAVIS's constructor sets, but for the Q-Former."""

    def build(kind):
        from lavis.models.base_model import BaseModel
        from lavis.models.blip2_models import blip2_opt, blip2_t5, modeling_opt, modeling_t5
        from torch import nn
        from transformers import AutoTokenizer, T5TokenizerFast

        cls = blip2_opt.Blip2OPT if kind == "opt" else blip2_t5.Blip2T5
        model = cls.__new__(cls)
        BaseModel.__init__(model)
        model.visual_encoder, model.ln_vision = cls.init_vision_encoder("eva_clip_g", 56, 0, False, "fp32")
        model.prompt, model.max_txt_len = "a", 32
        if kind == "opt":
            language = modeling_opt.OPTForCausalLM.from_pretrained(opt_folder, attn_implementation="eager")
            model.opt_tokenizer = AutoTokenizer.from_pretrained(opt_folder, use_fast=False)
            model.opt_model, model.opt_proj = language, nn.Linear(8, 32)
        else:
            language = modeling_t5.T5ForConditionalGeneration.from_pretrained(t5_folder, attn_implementation="eager")
            model.t5_tokenizer = T5TokenizerFast.from_pretrained(t5_folder)
            model.t5_model, model.t5_proj, model._apply_lemmatizer = language, nn.Linear(8, 32), False
        return model.eval()

    return build


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_swapped_model_shares_its_parts_and_works(lavis_blip2, kind, samples):
    from lavis_svp.hosts import swap_projector

    original = lavis_blip2(kind)
    theirs = getattr(original, f"{kind}_model")
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    swapped, processor = swap_projector(original, None, "mask_pool", superpixels=GRID)
    assert processor is None and type(swapped).__name__ == f"Blip2{kind.upper()}Svp" and not swapped.training
    own = getattr(swapped, f"{kind}_model")
    assert type(own).__module__.startswith("transformers.")
    shared = {name: p.data_ptr() for name, p in theirs.named_parameters()}
    assert {name: p.data_ptr() for name, p in own.named_parameters()} == shared
    assert swapped.visual_encoder is original.visual_encoder
    assert not any(parameter.is_meta for parameter in swapped.parameters())
    assert swapped.visual_tokens(samples).valid.sum(dim=1).tolist() == [6, 6, 6]
    assert torch.isfinite(swapped(samples)["loss"])
    assert len(swapped.generate(samples, num_beams=3, max_length=4)) == 3
    after = original.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_swap_blip2_is_the_same_and_refuses_others(lavis_blip2, make, samples):
    from lavis_svp.common.registry import UnknownNameError
    from lavis_svp.hosts.blip2 import swap_blip2

    swapped = swap_blip2(lavis_blip2("opt"), "svp", GRID, sspe_width=16, mask_size=8)
    assert swapped.swap.options == {"sspe_width": 16, "mask_size": 8} and swapped.prompt == "a"
    with pytest.raises(UnknownNameError, match="Blip2OPTSvp"):
        swap_blip2(swapped)
    with pytest.raises(ValueError, match="sspe_widht"):
        swap_blip2(lavis_blip2("opt"), "svp", GRID, sspe_widht=16)


def test_the_documented_swap_runs(lavis_blip2, samples):
    """The Python of docs/hosts.md, given a model and a batch."""
    text = (Path(__file__).parents[3] / "docs" / "hosts.md").read_text()
    block = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "swapped" in code)
    names = {"model": lavis_blip2("opt"), "image": samples["image"], "captions": samples["text_input"]}
    exec(block, names)
    assert len(names["written"]) == 3 and names["loss"].requires_grad


def test_levels_are_refused(lavis_blip2):
    from lavis_svp.hosts import swap_projector

    with pytest.raises(ValueError, match="leave levels out"):
        swap_projector(lavis_blip2("opt"), None, "mlp", levels=[1])
