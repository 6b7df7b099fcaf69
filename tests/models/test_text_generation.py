"""svp_ris answers in words: LAVIS's generate and predict_answers, and training on texts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lavis_svp.language.generate import likelihoods
from lavis_svp.models.text_generation import TextGenerator

QUESTIONS = [["how many cups are there?", "what color is it?"], ["is there a cat?"]]
ANSWERS = [["2", "red"], ["no"]]
CANDIDATES = ["yes", "no", "2", "dark red", "0"]


@pytest.fixture(scope="module")
def model(make_model):
    made = make_model().eval()
    with torch.no_grad():  # attention of random weights is all but even; sharp, it depends on the positions
        for name, parameter in made.language.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(20.0)
    return made


@pytest.fixture
def asked(batch):
    return {"image": batch["image"], "original_size": batch["original_size"], "text_input": QUESTIONS}


def one(samples, image, number):
    """A sample with one question of one image."""
    return {
        **{key: samples[key][image : image + 1] for key in ("image", "original_size")},
        "text_input": [samples["text_input"][image][number]],
    }


def loss_of(model, samples):
    random.seed(0)
    torch.manual_seed(0)
    return model(samples)


@pytest.mark.parametrize("method", ["generate", "rank"])
def test_all_at_once_equals_one_by_one(model, asked, method):
    options = {"inference_method": method, "answer_list": CANDIDATES}
    together = model.predict_answers(asked, **options)
    assert [len(said) for said in together] == [2, 1]
    alone = [
        [model.predict_answers(one(asked, image, number), **options)[0] for number in range(len(said))]
        for image, said in enumerate(QUESTIONS)
    ]
    assert together == alone
    if method == "rank":
        assert all(answer in CANDIDATES for said in together for answer in said)


def slow_likelihood(model, samples, question, answer):
    """Sum of the log-probabilities of an answer's tokens: the words appended one by one, no packing."""
    encoded = model.encode(samples)
    visual = encoded.visual.tokens[:1, : encoded.counts[0]]
    turn = model.prompt_builder.text_turn(question, answer)
    prefix = model.prompt_builder.prefix_ids()

    def embedded(ids):
        return model.language.embed(torch.tensor([ids], dtype=torch.long))

    total = 0.0
    for place in range(turn.prompt_length, len(turn.ids)):
        sequence = torch.cat([embedded(prefix), visual, embedded(turn.ids[:place])], 1)
        length = sequence.shape[1]
        mask = torch.full((length, length), torch.finfo(sequence.dtype).min).triu(1)[None, None]
        states = model.language(sequence, mask, torch.arange(length)[None])
        total += float(model.language.logits(states[:, -1]).log_softmax(-1)[0, turn.ids[place]])
    return total


@torch.no_grad()
def test_likelihoods_are_those_of_the_words_one_by_one(model, asked):
    sample, question = one(asked, 0, 0), QUESTIONS[0][0]
    encoded = model.encode(sample)
    turns = [model.prompt_builder.text_turn(question, answer, index=index) for index, answer in enumerate(CANDIDATES)]
    visual = encoded.visual.tokens[:, : encoded.counts[0]]
    scores = likelihoods(model.language, visual, model.prompt_builder.prefix_ids(), turns)
    slow = [slow_likelihood(model, sample, question, answer) for answer in CANDIDATES]
    assert torch.allclose(scores, torch.tensor(slow), atol=1e-4)


@torch.no_grad()
def test_rank_takes_the_likeliest_answer(model, asked):
    sample = one(asked, 0, 0)
    scores = {answer: slow_likelihood(model, sample, QUESTIONS[0][0], answer) for answer in CANDIDATES}
    options = {"inference_method": "rank", "answer_list": CANDIDATES}
    assert model.predict_answers(sample, **options) == [max(scores, key=scores.get)]
    turns = {answer: model.prompt_builder.text_turn(QUESTIONS[0][0], answer) for answer in CANDIDATES}
    first = {answer: turn.ids[turn.prompt_length] for answer, turn in turns.items()}
    assert model.predict_answers(sample, num_ans_candidates=1, **options)[0] in first


def test_a_list_longer_than_the_candidates_is_cut_by_the_first_token(model, asked):
    sample = one(asked, 0, 0)
    options = {"inference_method": "rank", "answer_list": CANDIDATES}
    kept = {model.predict_answers(sample, num_ans_candidates=n, **options)[0] for n in range(1, len(CANDIDATES) + 1)}
    assert kept <= set(CANDIDATES)
    assert model.predict_answers(sample, num_ans_candidates=99, **options) == model.predict_answers(sample, **options)


def test_length_limits_hold(model, asked):
    for most, least in ((1, 1), (3, 3), (6, 2)):
        answers = TextGenerator(model.language, model.prompt_builder)._generate(
            model.encode(asked),
            [[model.prompt_builder.text_turn(text, "?", index=i) for i, text in enumerate(said)] for said in QUESTIONS],
            most,
            least,
        )
        eos = model.language.tokenizer.eos_token_id
        for ids in answers.ids:
            assert least <= len(ids) <= most and eos not in ids[:least]


def test_captions_of_every_image(model, batch):
    plain = {key: batch[key] for key in ("image", "original_size")}
    captions = model.generate(plain, max_length=7)
    assert len(captions) == 2 and all(isinstance(text, str) for text in captions)
    assert model.generate({**plain, "text_input": ["", ""]}, max_length=7) == captions
    wording = model.prompt_builder.options.caption_questions[0]
    assert model.generate({**plain, "prompt": wording}, max_length=7) == captions
    assert model.generate({**plain, "prompt": [wording, "what?"]}, max_length=7)[0] == captions[0]


def test_one_question_is_put_to_every_image(model, batch):
    plain = {key: batch[key] for key in ("image", "original_size")}
    one_each = model.predict_answers({**plain, "text_input": ["how many?"] * 2})
    assert model.predict_answers({**plain, "text_input": "how many?"}) == one_each
    with pytest.raises(ValueError, match="2 images but 3 texts"):
        model.predict_answers({**plain, "text_input": ["how many?"] * 3})


def test_a_prompt_replaces_the_wording(model, asked):
    sample = one(asked, 1, 0)
    same = model.prompt_builder.options.vqa_questions[0].replace("{question}", "{}")
    assert model.predict_answers(sample, prompt=same) == model.predict_answers(sample)
    with pytest.raises(ValueError, match="lacks the field"):
        model.predict_answers(sample, prompt="Answer!")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams is 3"),
        ({"inference_method": "rnk"}, "rank"),
        ({"inference_method": "rank"}, "answer_list"),
        ({"beam": 1}, "does not know beam"),
        ({"max_len": 1, "min_len": 4}, "at least 4 and at most 1"),
    ],
)
def test_what_is_not_supported_is_told(model, asked, options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        model.predict_answers(asked, **options)


@pytest.mark.parametrize(
    "options", [{"num_beams": 5}, {"use_nucleus_sampling": True}, {"num_captions": 2}, {"repetition_penalty": 1.5}]
)
def test_generate_refuses_what_it_does_not_do(model, batch, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is"):
        model.generate({"image": batch["image"]}, **options)


def test_training_on_texts_alone_runs_every_part(make_model, batch):
    model = make_model()
    samples = {key: batch[key] for key in ("image", "original_size")}
    losses = loss_of(model, {**samples, "text_input": QUESTIONS, "text_output": ANSWERS})
    assert float(losses["loss_bce"].detach()) == 0 and float(losses["loss_ce"].detach()) > 0
    losses["loss"].backward()
    assert not [
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None and "iou" not in name
    ]
    assert all(p.grad is not None for p in model.mask_head.mask_decoder.output_upscaling.parameters())


@pytest.mark.parametrize("layout", ["separate", "packed", "conversation"])
def test_a_mixed_batch_learns_both(make_model, batch, layout):
    model = make_model(layout=layout)
    said = [[None, "2", None], ["a cat"]]
    mixed = {**batch, "text_output": said, "has_target": [[True, False, True], [False]]}
    mixed["masks"] = [[batch["masks"][0][0], None, batch["masks"][0][2]], [None]]
    mixed["text_input"] = [["the red cup", "how many?", "the star"], [""]]
    losses = loss_of(model, mixed)
    assert float(losses["loss_bce"].detach()) > 0
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])


@pytest.mark.slow
def test_answers_are_learned_as_they_will_be_generated(make_model, batch):
    """A few steps on one batch, and the model says what it was taught, in each task."""
    model = make_model(visual_tokens={"norm": True})
    samples = {key: batch[key] for key in ("image", "original_size")}
    taught = {**samples, "text_input": [["how many?", ""], ["how many?", ""]]}
    taught["text_output"] = [["two", "red cups"], ["none", "a cat"]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.language.embed_tokens.requires_grad_(True)
    optimizer.add_param_group({"params": model.language.embed_tokens.parameters()})
    for _ in range(80):
        optimizer.zero_grad()
        random.seed(0)
        model(taught)["loss"].backward()
        optimizer.step()
    model.eval()
    assert model.predict_answers({**samples, "text_input": ["how many?", "how many?"]}) == ["two", "none"]
    assert model.generate(samples) == ["red cups", "a cat"]


def test_an_answer_cannot_smuggle_in_a_mask(make_model, batch):
    model = make_model()
    samples = {key: batch[key] for key in ("image", "original_size")}
    losses = loss_of(model, {**samples, "text_input": ["what?", "[SEG]?"], "text_output": ["[SEG]", "<image>"]})
    assert np.isfinite(float(losses["loss"].detach())) and float(losses["loss_bce"].detach()) == 0


def test_data_sets_of_all_three_tasks_mix_within_a_batch(make_model, tmp_path):
    """As runner_svp mixes them: LAVIS's ConcatDataset keeps the keys that all samples have, and nothing is lost."""
    from lavis.common.registry import registry
    from lavis.datasets.data_utils import concat_datasets
    from omegaconf import OmegaConf

    parts = []
    for name in ("refshapes_seg", "refshapes_vqa", "refshapes_caption"):
        cls = registry.get_builder_class(name)
        section = OmegaConf.load(cls.default_config_path("train")).datasets[name]
        processors = {mode: {"image_size": 128} for mode in ("train", "eval")}
        info = {"root": str(tmp_path), "sizes": {"train": 2}}
        changes = {"vis_processor": processors, "build_info": info, "sampling": {"expressions_per_image": 2}}
        parts.append(cls(OmegaConf.merge(section, changes)).build_datasets()["train"])
    joined = concat_datasets({"train": parts})["train"]
    samples = joined.collater([joined[index] for index in range(len(joined))])
    assert [len(texts) for texts in samples["text_input"]] == [2, 2, 2, 2, 1, 1]
    assert samples["text_output"][0] == [None, None] and all(samples["text_output"][2])
    assert samples["text_input"][4] == [""] and len(set(samples["image_key"])) == 2
    losses = loss_of(make_model(auxiliary_losses={"word_alignment": 1.0}), samples)
    assert float(losses["loss_bce"].detach()) > 0 and float(losses["loss_word"].detach()) > 0
    losses["loss"].backward()
