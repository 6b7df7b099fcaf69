"""LAVIS task: caption images, and score the captions by COCO's evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lavis.common.registry import registry

from lavis_svp.datasets.refcoco import load_json
from lavis_svp.tasks.answer_task import Answer, AnswerTask
from lavis_svp.tasks.caption_scoring import caption_scores

MAX_LEN, MIN_LEN = 40, 1


@registry.register_task("svp_captioning")
class SvpCaptioningTask(AnswerTask):
    """Trains and scores models that have ``generate``.

    In the YAML: ``run.task: svp_captioning``; LAVIS's keys ``run.num_beams``, ``max_len``, ``min_len`` with their
    meaning there; and ``run.eval`` (see :class:`~lavis_svp.tasks.answer_task.AnswerEvalOptions`). The references are
    the split's own file; LAVIS's task ``captioning`` downloads COCO's. Files: see
    :class:`~lavis_svp.tasks.answer_task.AnswerTask`.
    """

    def asked_with(self) -> dict[str, Any]:
        """The arguments of ``generate``."""
        return {
            "use_nucleus_sampling": False,
            "num_beams": self.run_value("num_beams", 1),
            "max_length": self.run_value("max_len", MAX_LEN),
            "min_length": self.run_value("min_len", MIN_LEN),
        }

    def ask(self, model: Any, samples: Mapping[str, Any]) -> list[Any]:
        """The model's captions of a batch of images."""
        return model.generate(samples, **self.asked_with())

    def official(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """COCO's results format."""
        return [{"image_id": one["image_id"], "caption": one["answer"]} for one in answers]

    def score(self, answers: Sequence[Answer]) -> tuple[dict[str, Any], dict[str, float]]:
        """COCO's scores; ``agg_metrics`` is CIDEr + BLEU-4, as in LAVIS."""
        (file,) = self.truth()
        references: dict[int, list[str]] = {one["image_id"]: [] for one in answers}
        for annotation in load_json(file)["annotations"]:
            if annotation["image_id"] in references:
                references[annotation["image_id"]].append(annotation["caption"])
        found = caption_scores(references, {one["image_id"]: one["answer"] for one in answers})
        result = {"overall": {"n": len(answers), **found["scores"]}, **found}
        if all("blind" in one for one in answers):
            result["blind"] = caption_scores(references, {one["image_id"]: one["blind"] for one in answers})["scores"]
        scores = {"agg_metrics": found["scores"]["CIDEr"] + found["scores"]["Bleu_4"], **found["scores"]}
        if "blind" in result:
            scores["blind CIDEr"] = result["blind"]["CIDEr"]
        return result, scores
