"""Official scores of answers in words: VQA accuracy (LAVIS ships the evaluation) and COCO's caption scores.

Captions are scored by pycocoevalcap: BLEU, ROUGE-L, CIDEr and, where there is Java, METEOR. SPICE is left out, because
pycocoevalcap downloads Stanford CoreNLP for it. The official tokenizer (PTBTokenizer) needs Java, too; without it,
captions are split by :func:`plain_tokens`, and the result records that: such scores are comparable with each other,
but not with published ones.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_svp.metrics.bootstrap import Bootstrap, cluster_sums, ratio_interval

DIGITS = 4  # to which the official VQA evaluation rounds per cent
BLEU_ORDER = 4
OFFICIAL = "PTBTokenizer"
PLAIN = "words in lower case, without punctuation (no Java for PTBTokenizer)"

Tokens = dict[int, list[str]]
"""{image: captions, their tokens separated by spaces}."""


def vqa_accuracies(annotations: Mapping[int, Mapping[str, Any]], answers: Mapping[int, str]) -> dict[int, float]:
    """Score each answer in per cent: the mean over all choices of nine of ten people of min(1, agreeing / 3).

    Answers are normalised as in the official evaluation: case, articles, punctuation, contractions, number words.

    Args:
        annotations: VQAv2's, by question id.
        answers: by question id; the ids must be those of the annotations.

    Raises:
        ValueError: the ids differ.
    """
    if set(annotations) != set(answers):
        raise ValueError(
            f"{len(set(annotations) - set(answers))} questions have no answer, and "
            f"{len(set(answers) - set(annotations))} answers no question."
        )
    truth = {number: copy.deepcopy(dict(annotation)) for number, annotation in annotations.items()}  # VQAEval edits it
    for annotation in truth.values():
        for number, answer in enumerate(annotation["answers"]):
            answer.setdefault("answer_id", number)  # VQAEval takes answers with equal keys for one person's
    result = {number: {"answer": answer} for number, answer in answers.items()}
    official = VQAEval(SimpleNamespace(qa=truth, getQuesIds=lambda: list(truth)), SimpleNamespace(qa=result), DIGITS)
    if truth:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a progress bar
            official.evaluate()
    return {number: float(official.evalQA[number]) for number in truth}


def majority_answers(annotations: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """For each question the commonest answer of its type: the best that a constant answer can do on these questions."""
    by_type: dict[str, Counter[str]] = {}
    for annotation in annotations.values():
        by_type.setdefault(annotation["question_type"], Counter())[_consensus_answer(annotation)] += 1
    best = {kind: min(counts, key=lambda answer: (-counts[answer], answer)) for kind, counts in by_type.items()}
    return {number: best[annotation["question_type"]] for number, annotation in annotations.items()}


def vqa_summary(
    annotations: Mapping[int, Mapping[str, Any]],
    answers: Mapping[int, str],
    blind: Mapping[int, str] | None = None,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Accuracies in per cent with their baselines: over all questions, by question type and by answer type.

    Args:
        annotations: as for :func:`vqa_accuracies`.
        answers: the model's.
        blind: its answers to the same questions about other images; None = not generated.
        bootstrap: of the interval, which resamples images.

    Returns:
        "overall", "by_kind", "by_answer_type": each with "n", "n_images", "accuracy", "accuracy_ci",
        "baseline_majority" (see :func:`majority_answers`) and, with ``blind``, "blind".
    """
    scores = {"accuracy": vqa_accuracies(annotations, answers)}
    scores["baseline_majority"] = vqa_accuracies(annotations, majority_answers(annotations))
    if blind is not None:
        scores["blind"] = vqa_accuracies(annotations, blind)

    def group(questions: Iterable[int]) -> dict[str, Any]:
        ids = list(questions)
        images = [annotations[number]["image_id"] for number in ids]
        means = {name: float(np.mean([by_id[number] for number in ids])) for name, by_id in scores.items()}
        sums = cluster_sums(np.array([scores["accuracy"][number] for number in ids]), images)
        interval = ratio_interval(sums, cluster_sums(np.ones(len(ids)), images), bootstrap or Bootstrap())
        return {"n": len(ids), "n_images": len(set(images)), **means, "accuracy_ci": interval}

    def groups(key: str) -> dict[str, Any]:
        members: dict[str, list[int]] = {}
        for number, annotation in annotations.items():
            members.setdefault(str(annotation[key]), []).append(number)
        return {name: group(ids) for name, ids in sorted(members.items())}

    return {
        "overall": group(annotations),
        "by_kind": groups("question_type"),
        "by_answer_type": groups("answer_type"),
    }


def caption_scores(references: Mapping[int, Sequence[str]], captions: Mapping[int, str]) -> dict[str, Any]:
    """Score one caption per image.

    Args:
        references: captions by people, by image.
        captions: of the model; the images must be the same.

    Returns:
        "scores": by COCO's names (``CIDEr``, ``Bleu_4`` ..., as fractions, CIDEr up to 10); "tokeniser"; "left_out":
        the metrics that could not be computed, each with the reason.

    Raises:
        ValueError: the images differ, or one has no reference.
    """
    if set(references) != set(captions) or not captions:
        raise ValueError(f"{len(references)} images have references and {len(captions)} captions; not the same ones.")
    empty = [number for number, texts in references.items() if not texts]
    if empty:
        raise ValueError(f"Images {empty[:5]} have no reference.")
    true_texts = {number: list(texts) for number, texts in references.items()}
    model_texts = {number: [text] for number, text in captions.items()}
    left_out = {"SPICE": "pycocoevalcap downloads Stanford CoreNLP for it"}
    official = _official_tokens(true_texts, model_texts) if shutil.which("java") else None
    if official is None:
        left_out["METEOR"] = "it needs Java"
    tokenized = official or [
        {number: list(map(plain_tokens, texts)) for number, texts in each.items()} for each in (true_texts, model_texts)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        scores = _coco_scores(tokenized[0], tokenized[1], with_meteor=official is not None)
    return {"scores": scores, "tokeniser": PLAIN if official is None else OFFICIAL, "left_out": left_out}


def plain_tokens(caption: str) -> str:
    """Words and numbers in lower case; apostrophes inside a word stay, all other punctuation goes."""
    return " ".join(re.findall(r"\w+(?:'\w+)*", caption.lower()))


def _consensus_answer(annotation: Mapping[str, Any]) -> str:
    answer = annotation.get("multiple_choice_answer")
    return str(answer) if answer else Counter(one["answer"] for one in annotation["answers"]).most_common(1)[0][0]


def _coco_scores(references: Tokens, captions: Tokens, with_meteor: bool) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    bleu = Bleu(BLEU_ORDER).compute_score(references, captions)[0]
    scores = {f"Bleu_{order}": float(value) for order, value in enumerate(bleu, start=1)}
    others = {"METEOR": Meteor} if with_meteor else {}
    others |= {"ROUGE_L": Rouge, "CIDEr": Cider}
    return scores | {name: float(scorer().compute_score(references, captions)[0]) for name, scorer in others.items()}


def _official_tokens(*texts: Mapping[int, list[str]]) -> list[Tokens] | None:
    """Tokenize by PTBTokenizer; None where it cannot work, as it writes a file next to its own code."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(by_image: Mapping[int, list[str]]) -> Tokens:
        # An empty caption would be lost; a full stop becomes one of no tokens.
        entries = {key: [{"caption": text or "."} for text in each] for key, each in by_image.items()}
        result = PTBTokenizer().tokenize(entries)
        if set(result) != set(by_image):
            raise OSError(f"it gave {len(result)} images for {len(by_image)}")
        return result

    try:
        return [tokens(each) for each in texts]
    except OSError as error:
        logging.warning("PTBTokenizer does not work here (%s); captions are split into plain words.", error)
        return None
