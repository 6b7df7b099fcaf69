"""VQA accuracy by the official evaluation, which LAVIS ships (``lavis.common.vqa_tools``)."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_svp.metrics.bootstrap import Bootstrap, cluster_sums, ratio_interval

DIGITS = 4  # to which the official evaluation rounds per cent


def vqa_accuracies(annotations: Mapping[int, Mapping[str, Any]], answers: Mapping[int, str]) -> dict[int, float]:
    """The accuracy of each answer in per cent: the mean over all choices of nine of ten people of min(1, agreeing / 3).

    Answers are normalised as officially: case, articles, punctuation, contractions, number words.

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
    truth = {number: copy.deepcopy(dict(annotation)) for number, annotation in annotations.items()}  # it changes them
    for annotation in truth.values():
        for number, answer in enumerate(annotation["answers"]):
            answer.setdefault("answer_id", number)  # it takes answers that are equal in all keys for one person's
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
        by_type.setdefault(annotation["question_type"], Counter())[_usual(annotation)] += 1
    best = {kind: min(counts, key=lambda answer: (-counts[answer], answer)) for kind, counts in by_type.items()}
    return {number: best[annotation["question_type"]] for number, annotation in annotations.items()}


def vqa_summary(
    annotations: Mapping[int, Mapping[str, Any]],
    answers: Mapping[int, str],
    blind: Mapping[int, str] | None = None,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Accuracies in per cent, over all questions, by question type and by answer type, beside their baselines.

    Args:
        annotations: as for :func:`vqa_accuracies`.
        answers: the model's.
        blind: its answers to the same questions about other images.
        bootstrap: of the interval, which resamples images.

    Returns:
        "overall", "by_kind", "by_answer_type": each with "n", "n_images", "accuracy", "accuracy_ci",
        "baseline_majority" (see :func:`majority_answers`) and, if asked for, "blind".
    """
    scores = {"accuracy": vqa_accuracies(annotations, answers)}
    scores["baseline_majority"] = vqa_accuracies(annotations, majority_answers(annotations))
    if blind is not None:
        scores["blind"] = vqa_accuracies(annotations, blind)

    def group(numbers: Iterable[int]) -> dict[str, Any]:
        chosen = list(numbers)
        images = [annotations[number]["image_id"] for number in chosen]
        means = {name: float(np.mean([by_id[one] for one in chosen])) for name, by_id in scores.items()}
        interval = _interval([scores["accuracy"][one] for one in chosen], images, bootstrap or Bootstrap())
        return {"n": len(chosen), "n_images": len(set(images)), **means, "accuracy_ci": interval}

    return {
        "overall": group(annotations),
        "by_kind": {kind: group(ids) for kind, ids in _grouped(annotations, "question_type").items()},
        "by_answer_type": {kind: group(ids) for kind, ids in _grouped(annotations, "answer_type").items()},
    }


def _grouped(annotations: Mapping[int, Mapping[str, Any]], key: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, annotation in annotations.items():
        groups.setdefault(str(annotation[key]), []).append(number)
    return dict(sorted(groups.items()))


def _interval(values: Sequence[float], images: Sequence[int], bootstrap: Bootstrap) -> tuple[float, float] | None:
    one_group = ["all"] * len(values)
    above = cluster_sums(np.array(values), images, one_group)
    return ratio_interval(above, cluster_sums(np.ones(len(values)), images, one_group), bootstrap)


def _usual(annotation: Mapping[str, Any]) -> str:
    given = annotation.get("multiple_choice_answer")
    return str(given) if given else Counter(one["answer"] for one in annotation["answers"]).most_common(1)[0][0]
