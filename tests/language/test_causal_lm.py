from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions, LoraOptions
from lavis_svp.language.generate import generate_answers
from lavis_svp.language.prompts import IGNORE, PromptBuilder, PromptOptions
from lavis_svp.language.splice import splice


@pytest.fixture(scope="module")
def language(tiny_llama):
    torch.manual_seed(0)
    model = LanguageModel(LanguageOptions(name=str(tiny_llama), tuning="full", train_embeddings="added")).eval()
    with torch.no_grad():
        model.added_embedding.normal_(0, 0.5)
    return model


def make_turns(language, layout="packed"):
    writer = PromptBuilder(language.tokenizer, PromptOptions(style="plain"), 64)
    texts = [["the red cup", "a much longer expression about a blue cup", "no"], ["the star"]]
    turns = [
        [
            writer.segmentation_turn(t, "It is [SEG].", index=i, first=i == 0 or layout != "conversation")
            for i, t in enumerate(row)
        ]
        for row in texts
    ]
    return writer.prefix_ids(), turns


def run(language, visual, counts, prefix, turns, layout):
    plan = splice(prefix, counts, turns, layout, language.max_length, "cpu")
    return plan, language.read(plan, visual)


def test_it_equals_the_hugging_face_model_on_plain_text(language, tiny_llama):
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = language.tokenizer("the red cup is here", return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    mask = torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -1e9)
    with torch.no_grad():
        expected = reference(ids).logits
        states = language(language.embed(ids), mask, torch.arange(length)[None])
    got = language.logits(states[0])[:, : expected.shape[-1]]
    torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_equals_separate_and_batched_equals_single(language):
    torch.manual_seed(1)
    visual, counts = torch.randn(2, 5, 32), [5, 2]
    prefix, turns = make_turns(language)
    by_layout = {}
    for layout in ("packed", "separate"):
        plan, states = run(language, visual, counts, prefix, turns, layout)
        places = plan.positions_predicting(language.seg_id)
        by_layout[layout] = states[places.rows, places.columns]
    torch.testing.assert_close(by_layout["packed"], by_layout["separate"], atol=1e-5, rtol=1e-4)
    plan, states = run(language, visual[1:], counts[1:], prefix, turns[1:], "packed")
    places = plan.positions_predicting(language.seg_id)
    torch.testing.assert_close(states[places.rows, places.columns], by_layout["packed"][3:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_later_turn_of_a_conversation_sees_the_earlier_ones(language):
    visual = torch.randn(2, 5, 32)
    prefix, turns = make_turns(language, "conversation")
    _, packed = run(language, visual, [5, 2], prefix, turns, "packed")
    _, conversation = run(language, visual, [5, 2], prefix, turns, "conversation")
    first = len(prefix) + 5 + len(turns[0][0].ids)
    torch.testing.assert_close(packed[0, :first], conversation[0, :first], atol=1e-5, rtol=1e-4)
    assert (packed[0, first : first + 5] - conversation[0, first : first + 5]).abs().max() > 1e-3


def test_loss_equals_a_slow_loop(language):
    torch.manual_seed(2)
    prefix, turns = make_turns(language)
    batch = splice(prefix, [5, 2], turns, "separate")
    labels = batch.labels
    states = torch.randn(*labels.shape, 32)
    values = [
        F.cross_entropy(language.logits(states[r, c - 1][None]), labels[r, c][None])
        for r in range(labels.shape[0])
        for c in range(1, labels.shape[1])
        if labels[r, c] != IGNORE
    ]
    torch.testing.assert_close(language.loss(states, batch), torch.stack(values).mean())


@torch.no_grad()
def test_generation_with_cache_equals_running_the_whole_text_again(language):
    torch.manual_seed(3)
    visual, counts = torch.randn(2, 5, 32), [5, 2]
    prefix, turns = make_turns(language)
    answers = generate_answers(language, visual, counts, prefix, turns)
    flat = [(b, turn) for b, row in enumerate(turns) for turn in row]
    assert answers.images == answers.image_index.tolist() == [0, 0, 0, 1]
    assert answers.expressions == answers.expression.tolist() == [0, 1, 2, 0]
    for said, (image, turn) in zip(answers.ids, flat, strict=True):
        ids = turn.ids[: turn.prompt_length]
        expected = []
        for _ in range(language.options.max_new_tokens):
            embedded = torch.cat(
                [
                    language.embed(torch.tensor([prefix])),
                    visual[image : image + 1, : counts[image]],
                    language.embed(torch.tensor([ids])),
                ],
                1,
            )
            length = embedded.shape[1]
            mask = torch.zeros(1, 1, length, length)
            mask = mask.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), torch.finfo(mask.dtype).min)
            states = language(embedded, mask, torch.arange(length)[None])
            expected.append(int(language.logits(states[0, -1:])[0].argmax()))
            ids = [*ids, expected[-1]]
            if expected[-1] == language.tokenizer.eos_token_id:
                break
        assert said == expected


@torch.no_grad()
def test_the_state_that_emits_seg_is_reported(language, monkeypatch):
    visual, counts = torch.randn(2, 5, 32), [5, 3]
    prefix, turns = make_turns(language)
    plain = generate_answers(language, visual, counts, prefix, turns)
    assert not any(plain.answered)
    original, calls = language.logits, []

    def favour_seg_second(states):
        calls.append(states)
        scores = original(states)
        scores[:, language.seg_id] = 1e9 if len(calls) == 2 else -1e9
        return scores

    monkeypatch.setattr(language, "logits", favour_seg_second)
    answers = generate_answers(language, visual, counts, prefix, turns)
    assert all(answers.answered)
    assert all(ids[1] == language.seg_id for ids in answers.ids)
    torch.testing.assert_close(answers.seg_states, calls[1])


@pytest.mark.parametrize(
    ("tuning", "embeddings", "trains"),
    [
        ("frozen", "added", {"added_embedding"}),
        ("frozen", "all", {"added_embedding", "embed_tokens"}),
        ("lora", "added", {"added_embedding", "lora"}),
        ("full", "added", {"added_embedding", "transformer"}),
    ],
)
def test_what_trains(tiny_llama, tuning, embeddings, trains):
    options = LanguageOptions(str(tiny_llama), 1, tuning, embeddings, LoraOptions(r=2, alpha=4))
    model = LanguageModel(options)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {"lora" if "lora_" in name else name.split(".")[0] for name in names}
    assert found == trains


def test_bad_options_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="tuning"):
        LanguageOptions(tuning="half")
    with pytest.raises(ValueError, match="train_embeddings"):
        LanguageOptions(train_embeddings="some")
    with pytest.raises(ValueError, match="has 2 layers"):
        LanguageModel(LanguageOptions(name=str(tiny_llama), num_layers=9))


@torch.no_grad()
def test_a_model_that_knows_seg_already_keeps_its_row_and_what_follows_it(tiny_llama, tmp_path):
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([AddedToken("[SEG]", normalized=False), AddedToken("<p>", normalized=False)])  # as GLaMM's
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(tokenizer) + 5)  # padded beyond the tokenizer
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = LanguageModel(LanguageOptions(name=str(tmp_path))).eval()
    assert own.seg_id == len(tokenizer) - 2 and own.vocabulary == len(tokenizer)
    ids = own.tokenizer("It is [SEG], <p> cup", return_tensors="pt")["input_ids"]
    assert {own.seg_id, own.seg_id + 1} <= set(ids[0].tolist())
    length = ids.shape[1]
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    states = own(own.embed(ids), mask, torch.arange(length)[None])
    expected = model.eval()(ids).logits[0, :, : own.vocabulary]
    torch.testing.assert_close(own.logits(states[0]), expected, atol=1e-5, rtol=1e-4)


def test_the_scale_of_visual_tokens_can_be_named(tiny_llama):
    name = str(tiny_llama)
    plain = LanguageModel(LanguageOptions(name=name)).embedding_std
    assert LanguageModel(LanguageOptions(name=name, embedding_std=0.25)).embedding_std == 0.25 != plain


def test_cutting_layers_cuts_their_types(tiny_llama):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lavis_svp.language.causal_lm import _cut_layers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_hidden_layers=3, **sizes))
    _cut_layers(model, 1)
    assert len(model.config.layer_types) == model.config.num_hidden_layers == len(model.model.layers) == 1
