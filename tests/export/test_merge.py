from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavis_svp.cli.export import main
from lavis_svp.common.checkpoints import save_checkpoint
from lavis_svp.export.merge import with_row
from lavis_svp.export.parity import Observation, compare, observe, probe_samples

LORA = {"tuning": "lora", "lora": {"r": 2, "alpha": 4, "dropout": 0.1}}
POINTER = {
    "seg_prompt": {"state_norm": "batch", "pointer": True},
    "auxiliary_losses": {"word_alignment": 1.0},
    "visual_tokens": {"norm": True},
}


def trained_model(make_model, folder, **sections):
    """A model as if it had been trained, and its checkpoint with its configuration."""
    model = make_model(**sections)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.5 if "lora" in name or "added" in name else 0.05) * torch.randn_like(parameter))
    section = json.loads(json.dumps(dataclasses.asdict(model.options)))
    config = {"model": {"arch": "svp_ris", "model_type": "tiny", **section}}
    save_checkpoint(folder / "checkpoint_7.pth", {"model": model.checkpoint_state(), "config": config, "iters": 7})
    return model.eval()


def plain_scores(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return tokenizer, ids, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits[0]


def own_scores(language, ids):
    length = ids.shape[1]
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    return language.logits(language(language.embed(ids), mask, torch.arange(length)[None])[0])


@pytest.mark.parametrize(
    ("kind", "language", "more"),
    [
        ("tied", {**LORA, "train_embeddings": "all"}, POINTER),
        ("untied", {**LORA, "train_embeddings": "all"}, {}),
        ("untied", {"tuning": "full", "train_embeddings": "added", "num_layers": 2}, {}),
        ("qwen", {**LORA, "train_embeddings": "added", "num_layers": 2}, {}),
        ("qwen", {"tuning": "full", "train_embeddings": "all"}, {"sam": {"train_decoder": False}}),
        pytest.param("smollm2", {**LORA, "train_embeddings": "all", "num_layers": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=["tied-lora", "untied-lora", "untied-full-cut", "padded-lora-cut", "padded-full", "smollm2"],
)
@torch.no_grad()
def test_the_exported_model_is_the_trained_one(make_model, language_folder, tmp_path, capsys, kind, language, more):
    from lavis_svp.models.svp_ris import SvpRis

    model = trained_model(make_model, tmp_path, language={"name": str(language_folder(kind)), **language}, **more)
    before, out = observe(model), tmp_path / "exported"
    main(["merge", "--checkpoint", str(tmp_path), "--out", str(out)])
    said = capsys.readouterr().out
    assert "equal within 0.0001" in said and ("Merged 0" in said) == (language["tuning"] == "full")
    assert {"config.json", "model.safetensors", "svp.safetensors", "svp.yaml", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }

    assert all(path.stat().st_mode & 0o044 for path in out.iterdir())
    again = SvpRis.from_config(OmegaConf.load(out / "svp.yaml").model).eval()
    assert not any("lora" in name for name, _ in again.named_parameters())
    difference = compare(before, observe(again))
    assert max(difference.tokens, difference.masks) < 1e-4 and difference.texts == 0

    tokenizer, ids, scores = plain_scores(out, "the red cup. It is [SEG]. Sure, [SEG].")
    assert (ids == model.language.seg_id).sum() == 2 and "[SEG]" in tokenizer.decode(ids[0])
    expected = own_scores(model.language, ids)
    torch.testing.assert_close(scores[:, : expected.shape[1]], expected, atol=1e-4, rtol=1e-4)
    grown = model.language.seg_id + 1 if kind != "qwen" else model.language.embed_tokens.num_embeddings
    assert scores.shape[1] == grown


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_adapters_of_quantised_weights_are_merged_into_whole_ones(make_model, language_folder, tmp_path, capsys):
    from lavis_svp.models.svp_ris import SvpRis

    language = {"name": str(language_folder("wide")), **LORA}
    quantised = {"quantization": "8bit", "device_map": {"": "cpu"}}
    trained_model(make_model, tmp_path, language={**language, **quantised})
    whole = make_model(language=language)
    whole.load_checkpoint(str(tmp_path / "checkpoint_7.pth"))
    out = tmp_path / "exported"
    main(["merge", "--checkpoint", str(tmp_path), "--out", str(out)])
    said = capsys.readouterr().out
    assert "Trained on 8bit weights" in said and "Merged 4 adapters" in said

    section = OmegaConf.load(out / "svp.yaml").model
    assert section.language.quantization == "none" and section.language.device_map is None
    difference = compare(observe(whole.eval()), observe(SvpRis.from_config(section).eval()))
    assert max(difference.tokens, difference.masks) < 1e-4 and difference.texts == 0


def test_shards_and_other_precisions(make_model, language_folder, tmp_path, capsys):
    trained_model(make_model, tmp_path, language={"name": str(language_folder("untied")), **LORA})
    more = ["--dtype", "bfloat16", "--shard-size", "2MB"]
    main(["merge", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), *more])
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert "(bfloat16)" in capsys.readouterr().out


def zero_row(module, monkeypatch):
    original = module.with_row
    monkeypatch.setattr(module, "with_row", lambda table, index, row: original(table, index, 0 * row))


def forgotten_adapters(module, monkeypatch):
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)


def not_a_number(module, monkeypatch):
    original = module.with_row
    monkeypatch.setattr(module, "with_row", lambda table, index, row: original(table * float("nan"), index, row))


@pytest.mark.parametrize("fault", [zero_row, forgotten_adapters, not_a_number])
def test_a_wrong_export_fails_loudly_and_leaves_nothing(
    make_model, language_folder, tmp_path, monkeypatch, capsys, fault
):
    from lavis_svp.export import merge as module

    trained_model(make_model, tmp_path, language={"name": str(language_folder("tied")), **LORA})
    fault(module, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "not the trained one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_7.pth"]


def test_an_existing_folder_is_not_overwritten(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--checkpoint", str(tmp_path), "--out", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "new")])
    assert "no checkpoint_<steps>.pth" in capsys.readouterr().err


def test_a_row_is_set_or_appended_and_the_table_is_not_touched():
    table, row = torch.zeros(3, 2), torch.ones(1, 2)
    assert with_row(table, 1, row).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert with_row(table, 3, row).tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert table.sum() == 0
    with pytest.raises(ValueError, match="only 3 rows"):
        with_row(table, 4, row)


def observation(score=2.0, logit=4.0, text="yes"):
    return Observation(torch.tensor([[1.0, score]]), [np.array([[logit, -1.0]]), np.array([[0.5]])], [text, "no"])


def test_differences_are_shares_of_the_largest_value():
    same = compare(observation(), observation())
    assert (same.tokens, same.masks, same.pixels, same.texts) == (0, 0, 0, 0)
    other = compare(observation(), observation(2.2, -4.0, "no"))
    assert abs(other.tokens - 0.1) < 1e-6 and other.masks == 2.0 and other.texts == 1
    assert abs(other.pixels - 1 / 3) < 1e-9 and "33" in str(other)


def test_other_shapes_are_infinitely_different():
    wide = Observation(torch.zeros(1, 3), observation().masks, ["yes", "no"])
    assert compare(observation(), wide).tokens == float("inf")


def test_the_probe_has_a_padded_image():
    samples = probe_samples(64)
    assert samples["image"].shape == (2, 4, 64, 64) and samples["image"][1, 3].sum() == 48 * 64
    assert samples["original_size"] == [(64, 64), (48, 64)] and samples["image"].min() >= 0
