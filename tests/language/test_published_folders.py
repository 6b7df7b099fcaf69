"""Language models in the forms they are published in: Vicuna's sharded folders with a sentencepiece tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions
from lavis_svp.language.prompts import IGNORE, PromptBuilder, PromptOptions

VOCABULARY = 320
SHARD = 40_000  # bytes, so that the tiny model makes several files


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **sizes)).eval()


@pytest.fixture
def vicuna_folder(request, tmp_path, llama, sentencepiece_folder):
    """A folder as lmsys/vicuna-7b-v1.5 has it: .bin or .safetensors parts, an index, tokenizer.model."""
    safe = request.param == "safetensors"
    llama.save_pretrained(tmp_path, max_shard_size=SHARD, safe_serialization=safe)
    for file in sentencepiece_folder.iterdir():
        shutil.copy(file, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    parts = sorted(name for name in names if name.startswith(f"{stem}-0000"))
    assert len(parts) > 1 and f"{stem}.{ending}.index.json" in names and "tokenizer.json" not in names
    return tmp_path


@pytest.mark.parametrize("vicuna_folder", ["safetensors", "bin"], indirect=True)
def test_a_sharded_folder_with_a_slow_tokenizer_is_loaded_whole(vicuna_folder, llama):
    language = LanguageModel(LanguageOptions(name=str(vicuna_folder), tuning="frozen")).eval()
    assert language.seg_id == VOCABULARY == len(language.tokenizer) - 1
    ids = language.tokenizer("the red cup", return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    mask = torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -1e9)
    with torch.no_grad():
        states = language(language.embed(ids), mask, torch.arange(length)[None])
        wanted = llama(ids).logits[0]
    torch.testing.assert_close(language.logits(states[0])[:, :VOCABULARY], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vicuna_folder", ["safetensors"], indirect=True)
def test_answers_are_found_in_sentencepieces_tokens(vicuna_folder):
    language = LanguageModel(LanguageOptions(name=str(vicuna_folder), tuning="frozen"))
    writer = PromptBuilder(language.tokenizer, PromptOptions(style="llava_v1"), 256)
    turn = writer.segmentation_turn("the red cup", "It is [SEG].")
    assert turn.ids.count(language.seg_id) == 1
    answer = [label for label in turn.labels if label != IGNORE]
    assert writer.decode(answer) == "It is [SEG]." and answer[-1] == language.tokenizer.eos_token_id
    assert writer.prefix_ids()[0] == language.tokenizer.bos_token_id


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("vicuna_folder", ["bin"], indirect=True)
def test_code_in_a_bin_part_is_refused_and_not_run(vicuna_folder, tmp_path):
    index = json.loads((vicuna_folder / "pytorch_model.bin.index.json").read_text())
    part = vicuna_folder / index["weight_map"]["model.norm.weight"]
    state = torch.load(part, weights_only=True)
    torch.save({**state, "model.norm.weight": Harmful(tmp_path / "it_ran")}, part)
    with pytest.raises(Exception, match="[Ww]eights"):
        LanguageModel(LanguageOptions(name=str(vicuna_folder), tuning="frozen"))
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("vicuna_folder", ["bin"], indirect=True)
def test_the_same_folder_builds_without_weights(vicuna_folder):
    skeleton = LanguageModel(LanguageOptions(name=str(vicuna_folder)), weights="none")
    assert skeleton.embed_tokens.weight.is_meta and skeleton.seg_id == VOCABULARY
    with pytest.raises(AttributeError, match="tokenizer"):
        _ = skeleton.tokenizer
