import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lavis_svp.zoo.smollm2_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(weights):
    return AutoTokenizer.from_pretrained(weights("smollm2_135m_instruct"))


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert tokenizer.unk_token_id == 0
    assert len(tokenizer) == 49152


def test_no_token_is_put_before_or_after(tokenizer):
    encoded = tokenizer("the red circle")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["the", "Ġred", "Ġcircle"]
    assert set(encoded) == {"input_ids", "attention_mask"}


def test_numbers_are_cut_into_digits(tokenizer):
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]


def test_a_special_token_in_text_is_one_token(tokenizer):
    assert tokenizer("a<|im_end|>b").input_ids[1] == 2


def test_the_chat_template_is_smollm2s(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


# The vocabulary lacks a few bytes: some control characters and the first bytes of rare planes above U+FFFF.
@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]), max_size=60))
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text


def test_another_kind_of_tokenizer_is_refused():
    with pytest.raises(ValueError, match="llama"):
        build_tokenizer({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"})
