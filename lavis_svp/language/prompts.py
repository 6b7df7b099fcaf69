"""From expressions to conversation text, and from text to token ids with labels found by character offsets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from lavis_svp.common.options import SetupError
from lavis_svp.common.registry import Registry
from lavis_svp.language.nouns import NounFinder

IGNORE = -100  # the label that cross-entropy skips
SEG_TOKEN = "[SEG]"
IMAGE_MARKER = "<image>"
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True)
class ConversationStyle:
    """How images, questions and answers are laid out as text; the visual tokens stand after ``before_image``.

    Args:
        before_image: text before the visual tokens, with the first user role.
        first_turn: first question and answer, with the fields ``{question}`` and ``{answer}``.
        next_turn: every further question and answer of the same conversation.
    """

    before_image: str
    first_turn: str
    next_turn: str


conversation_styles: Registry[ConversationStyle] = Registry("conversation style")
conversation_styles.register("plain")(
    ConversationStyle(before_image="", first_turn="{question}\n{answer}", next_turn="\n{question}\n{answer}")
)
conversation_styles.register("chatml")(
    ConversationStyle(
        before_image="<|im_start|>user\n",
        first_turn="\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}",
        next_turn="\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}",
    )
)
conversation_styles.register("llava_v1")(
    ConversationStyle(
        before_image=VICUNA_SYSTEM + " USER: The ",
        first_turn=" provides an overview of the picture.\n{question} ASSISTANT: {answer}",
        next_turn="USER: {question} ASSISTANT: {answer}",
    )
)


@dataclass(frozen=True)
class PromptOptions:
    """The wording; the defaults follow GLaMM's referring segmentation pools (in our own words).

    Args:
        style: name of a conversation style: ``plain``, ``chatml`` or ``llava_v1``.
        questions: wordings with the field ``{expression}``; training draws one, evaluation takes the first.
        answers: wordings that hold ``[SEG]`` exactly once; training draws one, teacher forcing takes the first.
        no_target_answer: the trained answer to "there is no such thing"; must not hold ``[SEG]``.
        vqa_questions: wordings with the field ``{question}``, for answers in words; drawn as ``questions`` are.
        caption_questions: wordings that ask for a caption; drawn likewise.
    """

    style: str = "llava_v1"
    questions: tuple[str, ...] = (
        "Can you segment {expression} in this image?",
        "Please segment {expression} in this image.",
        "What is {expression} in this image? Please answer with a segmentation mask.",
        "Could you give a mask for {expression} in this picture?",
    )
    answers: tuple[str, ...] = ("It is [SEG].", "Sure, [SEG].", "Sure, it is [SEG].", "[SEG].")
    no_target_answer: str = "There is no such thing."
    vqa_questions: tuple[str, ...] = ("{question} Answer in a word or a short phrase.",)
    caption_questions: tuple[str, ...] = ("Describe this picture in one sentence.",)

    def __post_init__(self) -> None:
        for question in self.questions:
            if "{expression}" not in question:
                raise ValueError(f"model.prompt.questions: {question!r} lacks the field '{{expression}}'.")
        for answer in self.answers:
            if answer.count(SEG_TOKEN) != 1:
                raise ValueError(f"model.prompt.answers: {answer!r} must hold {SEG_TOKEN} exactly once.")
        if not self.questions or not self.answers:
            raise ValueError("model.prompt needs at least one question and one answer.")
        for question in self.vqa_questions:
            if "{question}" not in question:
                raise ValueError(f"model.prompt.vqa_questions: {question!r} lacks the field '{{question}}'.")
        for key in ("vqa_questions", "caption_questions"):
            if not getattr(self, key) or not all(getattr(self, key)):
                raise ValueError(f"model.prompt.{key} needs at least one wording, and none that is empty.")
        if SEG_TOKEN in self.no_target_answer or not self.no_target_answer:
            raise ValueError(f"model.prompt.no_target_answer must be text without {SEG_TOKEN}.")
        conversation_styles.get(self.style)


def escape_special_tokens(text: str, markers: tuple[str, ...] = (SEG_TOKEN, IMAGE_MARKER)) -> str:
    """Break special markers inside user text, so that they are read as plain words.

    ``[SEG]`` becomes ``[ SEG ]``; the tokenizer then cannot make the special token of it.

    Args:
        text: what the user wrote.
        markers: strings whose first and last characters are brackets.
    """
    for marker in markers:
        text = text.replace(marker, f"{marker[0]} {marker[1:-1]} {marker[-1]}")
    return text


@dataclass(frozen=True)
class Turn:
    """Token ids of one question and its answer.

    Args:
        ids: token ids of the turn.
        labels: the id where the token belongs to the answer, ``IGNORE`` elsewhere.
        expression: index of the expression within its image.
        user_text: first token of the user's own words in the prompt, and the one after their last; (0, 0) = unknown.
        nouns: the known nouns of an expression: the last token of each, and its index in the table of nouns.
        answer_can_be_cut: whether the answer is words, whose end may be left out, and not ``[SEG]``.
        shortened: whether something was left out.
    """

    ids: list[int]
    labels: list[int]
    expression: int
    user_text: tuple[int, int] = (0, 0)
    nouns: tuple[tuple[int, int], ...] = ()
    answer_can_be_cut: bool = False
    shortened: bool = False
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        supervised = [i for i, label in enumerate(self.labels) if label != IGNORE]
        if not supervised:
            raise ValueError("A turn has no answer token; is the answer empty?")
        object.__setattr__(self, "prompt_length", supervised[0])

    def fitted(self, limit: int) -> Turn:
        """This turn, or in training a shorter one, as LLaVA cuts what is too long.

        The end of an answer in words is left out, with the end-of-text token; where the answer is ``[SEG]``, or where
        the prompt alone is too long, the end of the user's words.

        Args:
            limit: the most tokens that it may have.

        Raises:
            ValueError: what must stay, at least one token of the user's words among it, is longer than ``limit``.
        """
        excess = len(self.ids) - limit
        if excess <= 0:
            return self
        if self.answer_can_be_cut and self.prompt_length < limit:
            return dataclasses.replace(self, ids=self.ids[:limit], labels=self.labels[:limit], shortened=True)
        first, stop = self.user_text
        cut = min(excess, stop - first - 1)
        if cut < 1 or (cut < excess and not self.answer_can_be_cut):
            raise ValueError(
                f"A turn of {len(self.ids)} tokens cannot be cut to {limit}: there is too little room for its wording "
                "and its answer. Raise model.language.max_turn_tokens or max_length, or use fewer visual tokens."
            )
        shorter = dataclasses.replace(
            self,
            ids=self.ids[: stop - cut] + self.ids[stop:],
            labels=self.labels[: stop - cut] + self.labels[stop:],
            user_text=(first, stop - cut),
            nouns=tuple((place, noun) for place, noun in self.nouns if place < stop - cut),
            shortened=True,
        )
        return shorter.fitted(limit)


class PromptBuilder:
    """Renders questions and answers, and tokenises them.

    Labels come from character offsets of the whole rendered turn: a token is supervised if it overlaps the answer or
    the space before it. So no arithmetic on lengths of separately tokenised parts is needed, which breaks when a
    tokenizer merges across their border, and the prompt's ids are the same whatever the answer is.

    Args:
        tokenizer: a fast tokenizer that already knows ``[SEG]``.
        options: the wording.
        max_turn_tokens: longest turn; a longer one is an error, or is cut where the caller asks for that.
        nouns: finds the nouns that expressions hold, for a model that compares them with what a classifier sees; None:
            nobody asks for them.

    Raises:
        ValueError: the tokenizer gives no offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: PromptOptions,
        max_turn_tokens: int,
        nouns: NounFinder | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer of this model."
            )
        self.tokenizer = tokenizer
        self.options = options
        self.style = conversation_styles.get(options.style)
        self.max_turn_tokens = max_turn_tokens
        self.nouns = nouns
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        markers = {SEG_TOKEN, IMAGE_MARKER, *tokenizer.all_special_tokens, *added}
        self.special = tuple(marker for marker in markers if len(marker) > 2)

    def prefix_ids(self) -> list[int]:
        """Ids before the visual tokens: the begin-of-text token, if the tokenizer has one, and ``before_image``."""
        ids = self.tokenizer(self.style.before_image, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        starts_with_bos = bool(ids) and ids[0] == bos
        return ids if bos is None or starts_with_bos else [bos, *ids]

    def segmentation_turn(
        self,
        expression: str,
        answer: str,
        *,
        question: int = 0,
        index: int = 0,
        first: bool = True,
        shorten: bool = False,
    ) -> Turn:
        """Tokenise one question and answer.

        Args:
            expression: the referring expression; special tokens in it are escaped.
            answer: the answer's text, without the end-of-text token (it is added and supervised).
            question: which wording of ``options.questions``.
            index: index of the expression within its image.
            first: the first turn after the image, or a further one.
            shorten: for training: cut the end of an expression that makes the turn longer than ``max_turn_tokens``.

        Raises:
            ValueError: an empty expression, or a turn longer than ``max_turn_tokens``.
        """
        wording, words = self.options.questions[question], self._escaped(expression)
        if not words:
            raise ValueError("The expression is empty; say what to segment.")
        span = _span(wording, "{expression}", words)
        turn = self._tokenize(
            wording.format(expression=words), span, answer, index=index, first=first, nouns=self.nouns
        )
        return self._checked(turn, words, shorten)

    def text_turn(
        self,
        question: str,
        answer: str,
        *,
        wording: int | None = 0,
        index: int = 0,
        first: bool = True,
        shorten: bool = False,
    ) -> Turn:
        """Tokenise a question that is answered in words, or a request for a caption, in the same conversation format.

        Args:
            question: special tokens in it are escaped; an empty question asks for a caption.
            answer: the answer's text, without the end-of-text token; all special tokens in it are escaped.
            wording: which of ``options.vqa_questions`` (``caption_questions`` for an empty question); None = the
                question stands as it is.
            index: index of the question within its image.
            first: the first turn after the image, or a further one.
            shorten: for training: cut the end of an answer, or of a question, that makes the turn longer than
                ``max_turn_tokens``.

        Raises:
            ValueError: an empty question without a wording, or a turn longer than ``max_turn_tokens``.
        """
        words, asked = self._escaped(question), "{question}"
        if wording is None and not words:
            raise ValueError("The prompt is empty; say what to ask.")
        if wording is not None:
            asked = self.options.vqa_questions[wording] if words else self.options.caption_questions[wording]
        text = asked.format(question=words) if words else asked
        span = _span(asked, "{question}", words) if words else (0, 0)
        turn = self._tokenize(text, span, self._escaped(answer), index=index, first=first)
        return self._checked(dataclasses.replace(turn, answer_can_be_cut=True), words, shorten)

    def check_wordings(self, room: int) -> None:
        """Refuse wordings that leave no room for a word of the user's, which no step of training could cut any further.

        Args:
            room: the most tokens that a turn may have: ``max_turn_tokens``, or what an image's visual tokens leave of
                the longest sequence.

        Raises:
            SetupError: names the wording, its tokens and the room.
        """
        options, answer = self.options, max(self.options.answers, key=len)
        wordings: list[tuple[str, str, Callable[..., Turn]]] = [
            ("questions", one, partial(self.segmentation_turn, "a", answer, question=number))
            for number, one in enumerate(options.questions)
        ]
        for key, words in (("vqa_questions", "a"), ("caption_questions", "")):
            wordings += [
                (key, one, partial(self.text_turn, words, "a", wording=number))
                for number, one in enumerate(getattr(options, key))
            ]
        for key, wording, make_turn in wordings:
            try:
                make_turn(shorten=True).fitted(room)
            except ValueError as error:
                raise SetupError(
                    f"model.prompt.{key}: {wording!r} leaves no room for a word of the user's: a turn may have "
                    f"{max(room, 0)} tokens beside the visual tokens. Shorten the wording, raise "
                    "model.language.max_length or max_turn_tokens, or set a lower model.superpixels.max_superpixels."
                ) from error

    def _tokenize(
        self,
        question: str,
        span: tuple[int, int],
        answer: str,
        *,
        index: int,
        first: bool,
        nouns: NounFinder | None = None,
    ) -> Turn:
        """Tokenise a question in its final wording, whose characters ``span`` are the user's, with its answer."""
        template = self.style.first_turn if first else self.style.next_turn
        closed_answer = answer + self.tokenizer.eos_token
        before = template.split("{answer}")[0].format(question=question)
        text = before + closed_answer
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [
            token if end > len(before.rstrip(" ")) else IGNORE  # a space before the answer is the answer's
            for token, (_, end) in zip(ids, offsets, strict=True)
        ]
        start = len(template.split("{question}")[0].format())
        low, high = start + span[0], start + span[1]
        inside = [place for place, (begin, end) in enumerate(offsets) if low <= begin < end <= high]
        user_text = (inside[0], inside[-1] + 1) if inside else (0, 0)
        places = []
        for noun in [] if nouns is None else nouns.find(text[low:high]):
            last = max(place for place, (begin, _) in enumerate(offsets) if begin < low + noun.end)
            places.append((last, noun.index))
        return Turn(ids=ids, labels=labels, expression=index, user_text=user_text, nouns=tuple(places))

    def _checked(self, turn: Turn, words: str, shorten: bool) -> Turn:
        if len(turn.ids) <= self.max_turn_tokens:
            return turn
        if shorten:
            return turn.fitted(self.max_turn_tokens)
        raise ValueError(
            f"A question and its answer make a turn of {len(turn.ids)} tokens, more than "
            f"model.language.max_turn_tokens = {self.max_turn_tokens}: {words[:60]!r}… Shorten it or raise the limit."
        )

    def _escaped(self, text: str) -> str:
        readable = _LONE_SURROGATES.sub(" ", text)  # halves of characters, which no tokenizer takes
        return escape_special_tokens(readable.strip(), self.special)

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, up to the end-of-text token."""
        eos = self.tokenizer.eos_token_id
        kept = ids[: ids.index(eos)] if eos in ids else ids
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()


def _span(wording: str, field_name: str, words: str) -> tuple[int, int]:
    """Where ``words`` begin in a wording, once they stand in place of the field, and where they end."""
    start = len(wording.split(field_name)[0].format())
    return start, start + len(words)
