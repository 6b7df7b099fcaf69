import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavis_svp.zoo.smollm2 import GGUF_FILE, huggingface_name, unpermuted

NAME = "smollm2_135m_instruct"
HEADS = {"attn_q.weight": 9, "attn_k.weight": 3}


def llama_cpp_order(weight, heads):
    """llama.cpp's own conversion of query and key rows, as its convert script has it."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("part", ["blk.29.", pytest.param("", marks=pytest.mark.slow)])
def test_every_tensor_equals_the_file(weights, original, part):
    reader = gguf.GGUFReader(original(NAME) / GGUF_FILE)
    names = {huggingface_name(tensor.name) for tensor in reader.tensors}
    with safe_open(weights(NAME) / "model.safetensors", "np") as converted:
        assert set(converted.keys()) == names and len(names) == len(reader.tensors) == 272
        for tensor in reader.tensors:
            if not tensor.name.startswith(part):
                continue
            found = converted.get_tensor(huggingface_name(tensor.name))
            for ending, heads in HEADS.items():
                if tensor.name.endswith(ending):
                    found = llama_cpp_order(found, heads)
            np.testing.assert_array_equal(found, gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name)


@pytest.mark.slow
def test_it_answers(weights):
    folder = weights(NAME)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.parametrize("heads", [1, 3])
def test_unpermuted_inverts_llama_cpp(heads):
    weight = np.random.default_rng(0).normal(size=(heads * 8, 5))
    np.testing.assert_array_equal(unpermuted(llama_cpp_order(weight, heads), heads), weight)


def test_an_unknown_tensor_is_refused():
    with pytest.raises(ValueError, match="output.weight"):
        huggingface_name("output.weight")
