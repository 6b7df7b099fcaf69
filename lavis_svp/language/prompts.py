"""From expressions to conversation text, and from text to token ids with labels found by character offsets."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lavis_svp.common.registry import Registry

IGNORE = -100  # the label that cross-entropy skips
SEG_TOKEN = "[SEG]"
IMAGE_MARKER = "<image>"

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
    """

    ids: list[int]
    labels: list[int]
    expression: int
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        supervised = [i for i, label in enumerate(self.labels) if label != IGNORE]
        if not supervised:
            raise ValueError("A turn has no answer token; is the answer empty?")
        object.__setattr__(self, "prompt_length", supervised[0])


class PromptBuilder:
    """Renders questions and answers, and tokenises them.

    Labels come from character offsets of the whole rendered turn: a token is supervised if it overlaps the answer or
    the space before it. So no arithmetic on lengths of separately tokenised parts is needed, which breaks when a
    tokenizer merges across their border, and the prompt's ids are the same whatever the answer is.

    Args:
        tokenizer: a fast tokenizer that already knows ``[SEG]``.
        options: the wording.
        max_turn_tokens: longest turn that is accepted.

    Raises:
        ValueError: the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: PromptOptions, max_turn_tokens: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer of this model."
            )
        self.tokenizer = tokenizer
        self.options = options
        self.style = conversation_styles.get(options.style)
        self.max_turn_tokens = max_turn_tokens
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
        self, expression: str, answer: str, *, question: int = 0, index: int = 0, first: bool = True
    ) -> Turn:
        """Tokenise one question and answer.

        Args:
            expression: the referring expression; special tokens in it are escaped.
            answer: the answer's text, without the end-of-text token (it is added and supervised).
            question: which wording of ``options.questions``.
            index: index of the expression within its image.
            first: the first turn after the image, or a further one.

        Raises:
            ValueError: an empty expression, or a turn longer than ``max_turn_tokens``.
        """
        if not expression.strip():
            raise ValueError("The expression is empty; say what to segment.")
        wording = self.options.questions[question].format(expression=self._escaped(expression))
        return self._tokenize(wording, answer, index=index, first=first)

    def text_turn(
        self, question: str, answer: str, *, wording: int | None = 0, index: int = 0, first: bool = True
    ) -> Turn:
        """Tokenise a question that is answered in words, or a request for a caption, in the same conversation format.

        Args:
            question: special tokens in it are escaped; an empty question asks for a caption.
            answer: the answer's text, without the end-of-text token; all special tokens in it are escaped.
            wording: which of ``options.vqa_questions`` (``caption_questions`` for an empty question); None = the
                question stands as it is.
            index: index of the question within its image.
            first: the first turn after the image, or a further one.

        Raises:
            ValueError: an empty question without a wording, or a turn longer than ``max_turn_tokens``.
        """
        text = self._escaped(question)
        if wording is None and not text:
            raise ValueError("The prompt is empty; say what to ask.")
        if wording is not None:
            text = (
                self.options.vqa_questions[wording].format(question=text)
                if text
                else self.options.caption_questions[wording]
            )
        return self._tokenize(text, self._escaped(answer), index=index, first=first)

    def _tokenize(self, question: str, answer: str, *, index: int = 0, first: bool = True) -> Turn:
        """Tokenise a question in its final wording together with its answer."""
        template = self.style.first_turn if first else self.style.next_turn
        closed_answer = answer + self.tokenizer.eos_token
        before = template.split("{answer}")[0].format(question=question)
        text = before + closed_answer
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if len(ids) > self.max_turn_tokens:
            raise ValueError(
                f"A question and its answer make a turn of {len(ids)} tokens, more than "
                f"model.language.max_turn_tokens = {self.max_turn_tokens}: {question[:60]!r}… "
                "Shorten it or raise the limit."
            )
        labels = [
            token if end > len(before.rstrip(" ")) else IGNORE  # a space before the answer is the answer's
            for token, (_, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return Turn(ids=ids, labels=labels, expression=index)

    def _escaped(self, text: str) -> str:
        return escape_special_tokens(text.strip(), self.special)

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, up to the end-of-text token."""
        eos = self.tokenizer.eos_token_id
        kept = ids[: ids.index(eos)] if eos in ids else ids
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()
