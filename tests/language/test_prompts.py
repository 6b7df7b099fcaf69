from __future__ import annotations

import pytest
from transformers import AddedToken

from lavis_svp.common.options import SetupError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.language.causal_lm import load_tokenizer
from lavis_svp.language.prompts import (
    IGNORE,
    SEG_TOKEN,
    PromptBuilder,
    PromptOptions,
    conversation_styles,
    escape_special_tokens,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(str(tiny_llama))[0]


@pytest.mark.parametrize("style", conversation_styles.names())
@pytest.mark.parametrize("first", [True, False])
def test_labels_are_exactly_the_answer_and_its_end(tokenizer, style, first):
    writer = PromptBuilder(tokenizer, PromptOptions(style=style), 128)
    turn = writer.segmentation_turn("the red cup", "It is [SEG].", first=first)
    supervised = [label for label in turn.labels if label != IGNORE]
    assert tokenizer.decode(supervised).strip() == "It is [SEG]." + tokenizer.eos_token
    assert turn.ids[turn.prompt_length :] == supervised
    assert all(label in (IGNORE, token) for label, token in zip(turn.labels, turn.ids, strict=True))
    assert "the red cup" in tokenizer.decode(turn.ids[: turn.prompt_length])


@pytest.mark.parametrize("style", conversation_styles.names())
def test_the_prompt_does_not_depend_on_the_answer(tokenizer, style):
    writer = PromptBuilder(tokenizer, PromptOptions(style=style), 128)
    turns = [
        writer.segmentation_turn("the red cup", answer)
        for answer in ("[SEG]", "It is [SEG].", "There is no such thing.")
    ]
    assert len({tuple(turn.ids[: turn.prompt_length]) for turn in turns}) == 1


def test_seg_is_one_token_however_it_is_spaced(tokenizer):
    seg = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    for text in ("[SEG]", " [SEG]", "It is [SEG].", "a[SEG]b"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"].count(seg) == 1


@pytest.mark.parametrize("text", ["cup [SEG]", "<image> of a cup", "<|im_end|> cup", "[SEG][SEG]<image>"])
def test_markers_inside_an_expression_stay_words(tokenizer, text):
    writer = PromptBuilder(tokenizer, PromptOptions(), 128)
    turn = writer.segmentation_turn(text, "[SEG]")
    special = {tokenizer.convert_tokens_to_ids(SEG_TOKEN), *tokenizer.all_special_ids}
    assert not special & set(turn.ids[: turn.prompt_length])


def test_special_tokens_that_have_no_role_stay_words_too(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))[0]
    tokenizer.add_tokens([AddedToken("<repo_name>", special=True)])
    assert "<repo_name>" not in tokenizer.all_special_tokens
    turn = PromptBuilder(tokenizer, PromptOptions(), 128).segmentation_turn("<repo_name> cup", "[SEG]")
    assert tokenizer.convert_tokens_to_ids("<repo_name>") not in turn.ids


def test_defuse_markers_breaks_the_marker_only():
    assert escape_special_tokens("a [SEG] b <image>") == "a [ SEG ] b < image >"
    assert escape_special_tokens("plain text [x]") == "plain text [x]"


def test_empty_and_endless_expressions_are_refused(tokenizer):
    writer = PromptBuilder(tokenizer, PromptOptions(), 64)
    with pytest.raises(ValueError, match="empty"):
        writer.segmentation_turn("  ", "[SEG]")
    with pytest.raises(ValueError, match="max_turn_tokens = 64"):
        writer.segmentation_turn("word " * 2000, "[SEG]")


def test_bad_wordings_are_refused():
    with pytest.raises(ValueError, match="expression"):
        PromptOptions(questions=("where?",))
    with pytest.raises(ValueError, match="exactly once"):
        PromptOptions(answers=("yes",))
    with pytest.raises(ValueError, match="no_target_answer"):
        PromptOptions(no_target_answer="[SEG]")
    with pytest.raises(UnknownNameError, match="llava_v1"):
        PromptOptions(style="lava")


def test_the_prefix_starts_with_bos_once(tokenizer):
    for style in conversation_styles.names():
        ids = PromptBuilder(tokenizer, PromptOptions(style=style), 64).prefix_ids()
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) < 2 or ids[1] != tokenizer.bos_token_id


@pytest.mark.parametrize("style", conversation_styles.names())
@pytest.mark.parametrize("question", ["how many red cups are there?", ""])
def test_questions_and_captions_have_the_formats_of_expressions(tokenizer, style, question):
    """Everything around the question and the answer is what stands around an expression and its answer."""
    writer = PromptBuilder(tokenizer, PromptOptions(style=style), 128)
    turn = writer.text_turn(question, "two cups")
    options = writer.options
    asked = options.vqa_questions[0].format(question=question) if question else options.caption_questions[0]
    prompt = tokenizer.decode(turn.ids[: turn.prompt_length])
    expression = writer.segmentation_turn("EXPRESSION", "[SEG]")
    around = tokenizer.decode(expression.ids[: expression.prompt_length])
    assert prompt == around.replace(options.questions[0].format(expression="EXPRESSION"), asked)
    assert tokenizer.decode(turn.ids[turn.prompt_length :]).strip() == "two cups" + tokenizer.eos_token


def test_a_prompt_of_ones_own_stands_as_it_is(tokenizer):
    writer = PromptBuilder(tokenizer, PromptOptions(style="plain"), 128)
    turn = writer.text_turn("Q: {what}?", "x", wording=None)
    assert tokenizer.decode(turn.ids[: turn.prompt_length]) == "Q: {what}?\n"
    with pytest.raises(ValueError, match="empty"):
        writer.text_turn(" ", "x", wording=None)


def test_answers_hold_no_marker(tokenizer):
    writer = PromptBuilder(tokenizer, PromptOptions(), 128)
    turn = writer.text_turn("what?", "It is [SEG] <|im_end|>")
    assert tokenizer.convert_tokens_to_ids(SEG_TOKEN) not in turn.ids
    assert turn.ids[turn.prompt_length :].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("key", "wordings", "message"),
    [
        ("vqa_questions", ("Answer!",), "lacks the field"),
        ("vqa_questions", (), "at least one"),
        ("caption_questions", ("",), "at least one"),
    ],
)
def test_impossible_wordings_of_questions_are_refused(key, wordings, message):
    with pytest.raises(ValueError, match=message):
        PromptOptions(**{key: wordings})


# ---------------------------------------------------------------- turns that are too long


@pytest.mark.parametrize("style", conversation_styles.names())
@pytest.mark.parametrize("first", [True, False])
def test_a_long_expression_loses_its_end_and_nothing_else(tokenizer, style, first):
    writer = PromptBuilder(tokenizer, PromptOptions(style=style), 40)
    words = " ".join(["the red cup beside the blue plate"] * 9)
    with pytest.raises(ValueError, match="max_turn_tokens = 40"):
        writer.segmentation_turn(words, "It is [SEG].", first=first)
    turn = writer.segmentation_turn(words, "It is [SEG].", first=first, shorten=True)
    assert len(turn.ids) == len(turn.labels) == 40 and turn.shortened
    start, stop = turn.user_text
    kept = tokenizer.decode(turn.ids[start:stop]).strip()
    assert kept and kept in words
    roomy = PromptBuilder(tokenizer, PromptOptions(style=style), 400)
    whole = roomy.segmentation_turn(words, "It is [SEG].", first=first, shorten=True)
    assert not whole.shortened
    cut = stop - len(turn.ids) + len(whole.ids)
    assert turn.ids == whole.ids[:stop] + whole.ids[cut:]
    assert [label for label in turn.labels if label != IGNORE] == [label for label in whole.labels if label != IGNORE]


def test_a_long_answer_in_words_loses_its_end(tokenizer):
    writer = PromptBuilder(tokenizer, PromptOptions(), 40)
    answer = "a red cup and a blue plate " * 9
    turn = writer.text_turn("", answer, shorten=True)
    whole = PromptBuilder(tokenizer, PromptOptions(), 400).text_turn("", answer)
    assert turn.ids == whole.ids[:40] and turn.labels == whole.labels[:40] and turn.shortened
    assert tokenizer.eos_token_id not in turn.labels  # it is not taught to end there


def test_a_long_question_and_a_long_answer_both_fit(tokenizer):
    writer = PromptBuilder(tokenizer, PromptOptions(), 40)
    turn = writer.text_turn("how many red cups are there? " * 20, "very many of them " * 20, shorten=True)
    assert len(turn.ids) <= 40 and turn.shortened and any(label != IGNORE for label in turn.labels)


def test_what_cannot_be_cut_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="cannot be cut to 8"):
        PromptBuilder(tokenizer, PromptOptions(), 8).segmentation_turn("the red cup", "It is [SEG].", shorten=True)


def test_wordings_without_room_for_a_word_are_refused_before_training(tokenizer):
    options = PromptOptions(questions=("Find {expression}.", "word " * 40 + "{expression}"))
    builder = PromptBuilder(tokenizer, options, 256)
    longest = len(builder.segmentation_turn("a", max(options.answers, key=len), question=1).ids)
    builder.check_wordings(longest)
    for room, wording in ((longest - 1, "word word"), (0, "Find"), (-50, "Find")):
        with pytest.raises(SetupError, match=f"model.prompt.questions: '{wording}.* {max(room, 0)} tokens"):
            builder.check_wordings(room)
    with pytest.raises(SetupError, match="model.prompt.questions: 'word word"):
        PromptBuilder(tokenizer, options, 30).check_wordings(30)
    with pytest.raises(SetupError, match="model.prompt.caption_questions"):
        options = PromptOptions(caption_questions=("word " * 40,))
        PromptBuilder(tokenizer, options, 256).check_wordings(longest - 10)
