"""LAVIS task: answer questions about images, and score the answers by the official VQA accuracy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lavis.common.registry import registry

from lavis_svp.datasets.refcoco import load_json
from lavis_svp.tasks.answer_task import Answer, AnswerTask
from lavis_svp.tasks.vqa_scoring import vqa_summary

MAX_LEN, MIN_LEN, CANDIDATES = 10, 1, 128  # LAVIS's defaults


@registry.register_task("svp_vqa")
class SvpVqaTask(AnswerTask):
    """Trains and scores models that have ``predict_answers``.

    In the YAML: ``run.task: svp_vqa``; LAVIS's keys ``run.num_beams``, ``max_len``, ``min_len``,
    ``inference_method``, ``num_ans_candidates``, ``prompt`` with their meaning there, but greedy generation by default;
    and ``run.eval`` (see :class:`~lavis_svp.tasks.answer_task.AnswerEvalOptions`). Files: see
    :class:`~lavis_svp.tasks.answer_task.AnswerTask`.
    """

    def asked_with(self) -> dict[str, Any]:
        """The arguments of ``predict_answers``."""
        return {
            "num_beams": self.run_value("num_beams", 1),
            "inference_method": self.run_value("inference_method", "generate"),
            "max_len": self.run_value("max_len", MAX_LEN),
            "min_len": self.run_value("min_len", MIN_LEN),
            "num_ans_candidates": self.run_value("num_ans_candidates", CANDIDATES),
            "prompt": self.run_value("prompt", ""),
        }

    def ask(self, model: Any, samples: Mapping[str, Any]) -> list[Any]:
        """The model's answers to a batch of questions."""
        answer_list = getattr(self._dataset, "answer_list", None)
        return model.predict_answers(samples=samples, answer_list=answer_list, **self.asked_with())

    def official(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """VQAv2's results format."""
        return [{"question_id": int(one["id"]), "answer": one["answer"]} for one in answers]

    def score(self, answers: Sequence[Answer]) -> tuple[dict[str, Any], dict[str, float]]:
        """Accuracies in per cent; none where the answers are not known."""
        files = self.truth()
        if len(files) < 2:
            logging.warning("The answers of this split are not known: nothing is scored.")
            return {"overall": {"n": len(answers)}}, {"agg_metrics": 0.0}
        asked = {int(one["id"]): one for one in answers}
        entries = {int(one["question_id"]): one for one in load_json(files[1])["annotations"]}
        unknown = [number for number in asked if number not in entries]
        if unknown:
            raise ValueError(f"{files[1]} has no answers to the questions {unknown[:3]}.")
        chosen = {number: entries[number] for number in asked}
        blind = {number: one["blind"] for number, one in asked.items() if "blind" in one} or None
        said = {number: one["answer"] for number, one in asked.items()}
        result = vqa_summary(chosen, said, blind, self.options.bootstrap)
        overall = result["overall"]
        scores = {"agg_metrics": overall["accuracy"], "accuracy": overall["accuracy"]}
        scores |= {key: overall[key] for key in ("baseline_majority", "blind") if key in overall}
        scores |= {f"accuracy {kind}": group["accuracy"] for kind, group in result["by_kind"].items()}
        return result, scores
