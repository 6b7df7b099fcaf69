from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions, LoraOptions
from lavis_svp.language.generate import generate_answers
from lavis_svp.language.prompts import IGNORE, PromptBuilder, PromptOptions
from lavis_svp.language.splice import splice
from tests.devices import LogicalCuda


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


# ---------------------------------------------------------------- number types, devices, quantised weights

HALF = (torch.bfloat16, torch.float16)


def make_language(folder, **options):
    torch.manual_seed(0)
    return LanguageModel(LanguageOptions(str(folder), lora=LoraOptions(r=2, alpha=4, dropout=0.0), **options))


def observe(language, autocast=None):
    """States, loss and gradients of a batch; with autocast as a runner has it."""
    torch.manual_seed(1)
    visual = torch.randn(2, 5, language.dim, requires_grad=True)
    prefix, turns = make_turns(language)
    batch = splice(prefix, [5, 2], turns, seg_id=language.seg_id)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        states = language.read(batch, visual)
        loss = language.loss(states, batch)
    loss.backward()
    return states, loss, visual.grad


def dtypes(language):
    kinds = {"lora": set(), "base": set(), "tables": set(), "rows": set()}
    for name, parameter in language.named_parameters():
        kind = "lora" if "lora_" in name else "base" if name.startswith("transformer") else "tables"
        kinds["rows" if name.startswith("added_") else kind].add(parameter.dtype)
    return kinds


@pytest.fixture(scope="module")
def untied_llama(tiny_llama, tmp_path_factory):
    """The tiny Llama with an output layer of its own, in float32 files."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("untied_llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tuning", "embeddings", "base", "tables"),
    [("lora", "added", True, True), ("frozen", "all", True, False), ("full", "added", False, True)],
)
def test_frozen_weights_have_the_named_dtype_and_trained_ones_float32(
    untied_llama, tuning, embeddings, base, tables, dtype
):
    language = make_language(untied_llama, tuning=tuning, train_embeddings=embeddings, dtype=dtype)
    half, full = {getattr(torch, dtype)}, {torch.float32}
    found = dtypes(language)
    assert found["base"] == (half if base else full) and found["tables"] == (half if tables else full)
    assert found["rows"] == full and found["lora"] in (set(), full)
    assert language.compute_dtype == found["base"].pop()
    assert all(parameter.dtype == torch.float32 for parameter in language.parameters() if parameter.requires_grad)


MIXTURES = [
    (tuning, embeddings, dtype, autocast, "sdpa")
    for tuning, embeddings in (("lora", "all"), ("lora", "added"), ("full", "added"), ("frozen", "all"))
    for dtype in ("float32", "bfloat16")
    for autocast in (None, torch.bfloat16)
] + [
    ("lora", "all", "float16", None, "sdpa"),
    ("lora", "all", "float16", None, "eager"),
    ("lora", "all", "bfloat16", None, "eager"),
    ("full", "all", "float32", torch.bfloat16, "eager"),
]


@pytest.mark.parametrize(("tuning", "embeddings", "dtype", "autocast", "attention"), MIXTURES)
def test_every_mixture_of_dtypes_trains(untied_llama, tuning, embeddings, dtype, autocast, attention):
    arguments = dict(tuning=tuning, train_embeddings=embeddings, attn_implementation=attention)
    exact = observe(make_language(untied_llama, **arguments, dtype="float32"))
    language = make_language(untied_llama, **arguments, dtype=dtype)
    states, loss, gradient = observe(language, autocast)
    assert language.transformer.config._attn_implementation == attention
    assert states.dtype == language.compute_dtype and loss.dtype == torch.float32
    for parameter in language.parameters():
        assert not parameter.requires_grad or parameter.grad is not None
    bounds = 0 if dtype == "float32" and autocast is None else 0.05  # of the largest value; bfloat16 has 8 bits
    for found, expected in zip((states, loss, gradient), exact, strict=True):
        assert (found.float() - expected).abs().max() <= bounds * expected.abs().max()


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_that_is_cast_whole_predicts(untied_llama, dtype):
    language = make_language(untied_llama, dtype="float32").eval()
    prefix, turns = make_turns(language)
    visual = torch.randn(2, 5, 32)
    exact = generate_answers(language, visual, [5, 2], prefix, turns)
    frequencies = language.transformer.rotary_emb.rotary.inv_freq.clone()
    language.to(dtype)
    found = generate_answers(language, visual, [5, 2], prefix, turns)
    assert {parameter.dtype for parameter in language.parameters()} == {dtype}
    assert found.seg_states.dtype == dtype and language.logits(found.seg_states).dtype == torch.float32
    assert (found.seg_states.float() - exact.seg_states).abs().max() < 0.1
    torch.testing.assert_close(language.transformer.rotary_emb.rotary.inv_freq, frequencies, rtol=0, atol=0)


def test_weights_are_never_loaded_in_float32_where_16_bits_are_asked_for(tiny_llama, monkeypatch):
    asked = []
    original = AutoModelForCausalLM.from_pretrained

    def load(*args, **kwargs):
        asked.append(kwargs["dtype"])
        return original(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    make_language(tiny_llama, dtype="bfloat16")
    make_language(tiny_llama)
    with LogicalCuda():
        make_language(tiny_llama)
        LanguageModel(LanguageOptions(str(tiny_llama)), device="cpu")
    make_language(tiny_llama, tuning="full", dtype="bfloat16")
    assert asked == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_what_is_chosen_to_train_later_becomes_float32(tiny_llama):
    language = make_language(tiny_llama, tuning="frozen", train_embeddings="added", dtype="bfloat16")
    language.embed_tokens.requires_grad_(True)
    language.keep_trained_in_float32()
    assert language.embed_tokens.weight.dtype == torch.float32 and language.compute_dtype == torch.bfloat16
    language.transformer.layers[1].mlp.requires_grad_(True)
    language.keep_trained_in_float32()
    assert dtypes(language)["base"] == {torch.float32} == {language.compute_dtype}


def test_a_model_without_weights_has_the_same_dtypes(untied_llama):
    for dtype in ("float32", "bfloat16"):
        options = LanguageOptions(str(untied_llama), dtype=dtype)
        skeleton, language = LanguageModel(options, "none"), LanguageModel(options)
        assert all(parameter.is_meta for parameter in skeleton.parameters())
        assert dtypes(skeleton) == dtypes(language)


def test_compiling_is_of_the_transformer_alone(tiny_llama):
    language = make_language(tiny_llama, tuning="frozen", train_embeddings="added").eval()
    prefix, turns = make_turns(language)
    batch, visual = splice(prefix, [5, 2], turns), torch.randn(2, 5, 32)
    names, calls = list(language.state_dict()), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = language.read(batch, visual)
        language.compile(backend=backend)
        torch.testing.assert_close(language.read(batch, visual), expected)
    assert calls and list(language.state_dict()) == names and language._compiled_call_impl is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="half"), "model.language.dtype is 'half'"),
        (dict(attn_implementation="flash_attention_2"), "known: auto, sdpa, eager"),
        (dict(quantization="2bit"), "known: none, 8bit, 4bit"),
        (dict(quantization="4bit", tuning="full"), "cannot be tuned in full"),
        (dict(device_map=3), "null, auto or a mapping"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageOptions(**options)


def test_a_device_map_is_for_inference(tiny_llama):
    language = make_language(tiny_llama, device_map={"": "cpu"})
    with pytest.raises(ValueError, match="for inference only"):
        observe(language)
    plain = make_language(tiny_llama).eval()
    with torch.no_grad():
        prefix, turns = make_turns(language)
        batch, visual = splice(prefix, [5, 2], turns), torch.randn(2, 5, 32)
        torch.testing.assert_close(language.eval().read(batch, visual), plain.read(batch, visual))
    with LogicalCuda():  # what accelerate has placed stays there when the whole model is moved
        language.to("cuda")
        assert {parameter.device.type for parameter in language.parameters()} == {"cpu"}
    language.to(torch.bfloat16)
    assert language.compute_dtype == torch.bfloat16


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_reaches_no_rotary_angle(tiny_llama, tf32):
    language, seen = make_language(tiny_llama).eval(), []
    rotary = [module for module in language.transformer.modules() if hasattr(module, "inv_freq")]
    for module in rotary:
        module.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32))
    with LogicalCuda(), torch.no_grad():
        language.to("cuda")(torch.randn(1, 3, 32).cuda(), torch.zeros(1, 1, 3, 3).cuda(), torch.arange(3).cuda()[None])
    assert seen == [False] and torch.backends.cuda.matmul.allow_tf32
    assert not any("rotary" in name for name in language.state_dict())


def test_a_table_that_is_offloaded_is_refused(untied_llama):
    layers = {f"model.{name}": "cpu" for name in ("layers", "norm", "rotary_emb")}
    with pytest.raises(ValueError, match="model.language.device_map offloads embed_tokens, which must lie on a device"):
        make_language(untied_llama, device_map={**layers, "model.embed_tokens": "disk", "lm_head": "cpu"})


def test_missing_bitsandbytes_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("lavis_svp.language.causal_lm.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="quantization is 4bit, which needs bitsandbytes: pip install"):
        LanguageModel(LanguageOptions("nowhere", quantization="4bit"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("quantization", "bound"), [("8bit", 0.1), ("4bit", 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_adapters_train_on_quantised_weights(wide_llama, quantization, bound, dtype, autocast):
    exact, _, _ = observe(make_language(wide_llama, train_embeddings="added"))
    language = make_language(wide_llama, train_embeddings="added", dtype=dtype, quantization=quantization)
    matrices = [parameter for name, parameter in language.named_parameters() if "proj" in name and "lora" not in name]
    assert matrices and not any(one.is_floating_point() or one.requires_grad for one in matrices)
    assert language.output.weight.dtype == language.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert dtypes(language)["lora"] == dtypes(language)["rows"] == {torch.float32}
    states, _, gradient = observe(language, autocast)
    assert states.dtype == language.compute_dtype == getattr(torch, dtype) and gradient.isfinite().all()
    assert (states.float() - exact).abs().max() < bound * exact.abs().max()
    assert all(parameter.grad is not None for parameter in language.parameters() if parameter.requires_grad)
    language.to(torch.bfloat16)
    assert observe(language)[0].dtype == torch.bfloat16
    for parameter in language.parameters():  # as DeepSpeed casts with amp_dtype fp16, which it refuses on most CPUs
        if parameter.is_floating_point():
            parameter.data = parameter.data.half()
    states, _, gradient = observe(language, torch.float16)
    assert states.dtype == torch.float16 and gradient.isfinite().all()
    assert (states.float() - exact).abs().max() < bound * exact.abs().max()
    answers = generate_answers(language.eval(), torch.randn(2, 5, 64), [5, 2], *make_turns(language))
    assert len(answers.ids) == 4
