"""LAVIS tasks that answer in words: questions about images (``svp_vqa``) and captions (``svp_captioning``)."""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from tqdm import tqdm

from lavis_svp.common.devices import wait_for
from lavis_svp.common.files import file_errors, read_json
from lavis_svp.common.paths import write_file
from lavis_svp.common.transfer import move_to_device
from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.models.batch import PREPARED
from lavis_svp.models.outputs import NoAnswer
from lavis_svp.tasks.answer_scores import caption_scores, vqa_summary
from lavis_svp.tasks.base import SvpTask, device_of, gather_records, result_folder

Answer = dict[str, Any]
"""One text of one image and the model's answer to it."""

MEND = "Fetch the annotations again."
IMAGE_KEYS = ("image", "region_map", "frozen", "original_size")
"""Keys of a batch that hold what the model sees of an image."""


@dataclass(frozen=True)
class AnswerEvalOptions:
    """``run.eval`` of ``svp_vqa`` and ``svp_captioning``.

    Args:
        blind: also answer every text with another image, which takes twice as long. The score that is left does not
            come from the image.
        bootstrap: of the confidence intervals: ``resamples``, ``seed``, ``level``.
    """

    blind: bool = False
    bootstrap: Bootstrap = Bootstrap()


class AnswerTask(SvpTask, ABC):
    """Collects and writes a model's answers; sub-classes produce and score them.

    Evaluating split S with tag E (epoch and step) writes, under the runner's result folder, ``S_E.jsonl`` (one line per
    text), ``S_E_result.json`` (the official results format) and ``S_E.summary.json``.
    """

    options_cls = AnswerEvalOptions
    options: AnswerEvalOptions

    @property
    def reads_raw_batches(self) -> bool:
        """The blind baseline gives texts other images, which it cannot once a batch is prepared."""
        return self.options.blind

    @abstractmethod
    def generation_settings(self) -> dict[str, Any]:
        """The arguments with which the model generates; the summary records them."""

    @abstractmethod
    def generate(self, model: Any, samples: Mapping[str, Any]) -> list[Any]:
        """The model's answers to a batch: B texts, or B lists of texts."""

    @abstractmethod
    def official(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The answers in the official results format."""

    @abstractmethod
    def score(self, answers: Sequence[Answer]) -> tuple[dict[str, Any], dict[str, float]]:
        """The summary, and flat numbers for the log with ``agg_metrics``."""

    def valid_step(self, model: Any, samples: Mapping[str, Any]) -> list[Answer]:
        """Answer the texts of a batch; one entry per text. The model is not wrapped in DDP."""
        device = device_of(model)
        wait_for(device)
        start = time.perf_counter()
        generated = [_as_list(one) for one in self.generate(model, samples)]
        wait_for(device)
        ms = 1000 * (time.perf_counter() - start) / max(1, sum(map(len, generated)))
        return [
            {"id": name, "image_id": int(samples["image_id"][index]), "file_name": samples["file_name"][index]}
            | {"kind": kind, "question": question, "answer": answer, "ms": ms}
            | _error_of(answer, f"Text {name} of {samples['file_name'][index]}")
            for index, answers in enumerate(generated)
            for name, kind, question, answer in zip(
                samples["expression_ids"][index],
                samples["kinds"][index],
                _as_list(samples["text_input"][index]),
                answers,
                strict=True,
            )
        ]

    @torch.no_grad()
    def evaluation(self, model: Any, data_loader: Iterable[Any], cuda_enabled: bool = True) -> list[Answer]:
        """Answer this process's share of a split, on the model's device; ``cuda_enabled`` is LAVIS's, and not used.

        Raises:
            ValueError: ``blind`` is set and the first batch holds no second image.
        """
        answers: list[Answer] = []
        swapper, device = ImageSwapper(), device_of(model)
        looks = {"desc": "Answering", "unit": "batch", "mininterval": 1, "disable": not is_main_process()}
        for batch in tqdm(data_loader, **looks):
            samples = move_to_device(batch, device)
            rows = self.valid_step(model, samples)
            if self.options.blind:
                swapped = swapper.swap(samples)
                if swapped is None:
                    raise ValueError(
                        "run.eval.blind needs another image in the first batch: raise run.batch_size_eval."
                    )
                blind = [answer for one in self.generate(model, swapped) for answer in _as_list(one)]
                rows = [{**row, "blind": other} for row, other in zip(rows, blind, strict=True)]
            answers += rows
        return answers

    def after_evaluation(
        self, val_result: list[Answer], split_name: str, epoch: int | str, **kwargs: Any
    ) -> dict[str, Any]:
        """Join all processes' answers, score them and write the result files.

        Returns:
            ``agg_metrics`` and more scores for the log, on every process.

        Raises:
            ValueError: a text of the split was not answered.
        """
        by_id = {answer["id"]: answer for part in gather_records(val_result) for answer in part}
        expected = self._dataset.expression_ids() if hasattr(self._dataset, "expression_ids") else list(by_id)
        missing = [name for name in expected if name not in by_id]
        if missing:
            raise ValueError(f"{len(missing)} of {len(expected)} texts were not answered, such as {missing[:3]}.")
        answers = [by_id[name] for name in expected]
        result, scores = self.score(answers)
        if is_main_process():
            folder = result_folder("result_dir")
            write_file(folder / f"{split_name}_{epoch}_result.json", json.dumps(self.official(answers)))
            self._write_result(split_name, epoch, answers, result, scores, asked=self.generation_settings())
            print("\n".join(f"{name:>24}  {value:.4g}" for name, value in scores.items()), flush=True)
            print(f"Answers and summary: {folder}", flush=True)
        return scores

    def ground_truth(self) -> tuple[Path, ...]:
        """The annotation files of the split that is evaluated; see ``AnsweringDataset.ground_truth``."""
        return tuple(getattr(self._dataset, "ground_truth", ()))

    def run_value(self, key: str, default: Any) -> Any:
        """A key of the run section, or the default where it is missing or None."""
        value = self.run_cfg.get(key)
        return default if value is None else value


@registry.register_task("svp_vqa")
class SvpVqaTask(AnswerTask):
    """Trains and scores models that have ``predict_answers``.

    In the YAML: ``run.task: svp_vqa``; LAVIS's keys ``run.num_beams``, ``max_len``, ``min_len``,
    ``inference_method``, ``num_ans_candidates`` and ``prompt`` with their meaning there, but with greedy generation
    as the default; and ``run.eval`` (see :class:`AnswerEvalOptions`). Files: see :class:`AnswerTask`.
    """

    def generation_settings(self) -> dict[str, Any]:
        """The arguments of ``predict_answers``, with LAVIS's defaults but for the beams."""
        defaults = {"num_beams": 1, "inference_method": "generate", "max_len": 10, "min_len": 1}
        defaults |= {"num_ans_candidates": 128, "prompt": ""}
        return {key: self.run_value(key, default) for key, default in defaults.items()}

    def generate(self, model: Any, samples: Mapping[str, Any]) -> list[Any]:
        """The model's answers to a batch of questions."""
        answer_list = getattr(self._dataset, "answer_list", None)
        return model.predict_answers(samples=samples, answer_list=answer_list, **self.generation_settings())

    def official(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """VQAv2's results format."""
        return [{"question_id": int(one["id"]), "answer": one["answer"]} for one in answers]

    def score(self, answers: Sequence[Answer]) -> tuple[dict[str, Any], dict[str, float]]:
        """Accuracies in per cent; nothing is scored where the true answers are not public."""
        files = self.ground_truth()
        if len(files) < 2:
            logging.warning("This split has no file of true answers: nothing is scored.")
            return {"overall": {"n": len(answers)}}, {"agg_metrics": 0.0}
        by_question = {int(one["id"]): one for one in answers}
        with file_errors(files[1], MEND):
            annotations = {int(one["question_id"]): one for one in read_json(files[1])["annotations"]}
        unknown = [number for number in by_question if number not in annotations]
        if unknown:
            raise ValueError(f"{files[1]} has no answers to the questions {unknown[:3]}.")
        result = vqa_summary(
            {number: annotations[number] for number in by_question},
            {number: one["answer"] for number, one in by_question.items()},
            {number: one["blind"] for number, one in by_question.items() if "blind" in one} or None,
            self.options.bootstrap,
        )
        overall = result["overall"]
        scores = {"agg_metrics": overall["accuracy"], "accuracy": overall["accuracy"]}
        scores |= {key: overall[key] for key in ("baseline_majority", "blind") if key in overall}
        scores |= {f"accuracy {kind}": group["accuracy"] for kind, group in result["by_kind"].items()}
        return result, scores


@registry.register_task("svp_captioning")
class SvpCaptioningTask(AnswerTask):
    """Trains and scores models that have ``generate``.

    In the YAML: ``run.task: svp_captioning``; LAVIS's keys ``run.num_beams``, ``max_len`` and ``min_len`` with their
    meaning there; and ``run.eval`` (see :class:`AnswerEvalOptions`). The references come from the split's own file;
    LAVIS's task ``captioning`` downloads COCO's. Files: see :class:`AnswerTask`.
    """

    def generation_settings(self) -> dict[str, Any]:
        """The arguments of ``generate``."""
        return {
            "use_nucleus_sampling": False,
            "num_beams": self.run_value("num_beams", 1),
            "max_length": self.run_value("max_len", 40),
            "min_length": self.run_value("min_len", 1),
        }

    def generate(self, model: Any, samples: Mapping[str, Any]) -> list[Any]:
        """The model's captions of a batch of images."""
        return model.generate(samples, **self.generation_settings())

    def official(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """COCO's results format."""
        return [{"image_id": one["image_id"], "caption": one["answer"]} for one in answers]

    def score(self, answers: Sequence[Answer]) -> tuple[dict[str, Any], dict[str, float]]:
        """COCO's scores; ``agg_metrics`` is CIDEr + BLEU-4, as in LAVIS."""
        (file,) = self.ground_truth()
        references: dict[int, list[str]] = {one["image_id"]: [] for one in answers}
        with file_errors(file, MEND):
            for annotation in read_json(file)["annotations"]:
                if annotation["image_id"] in references:
                    references[annotation["image_id"]].append(str(annotation["caption"]))
        coco = caption_scores(references, {one["image_id"]: one["answer"] for one in answers})
        result = {"overall": {"n": len(answers), **coco["scores"]}, **coco}
        scores = {"agg_metrics": coco["scores"]["CIDEr"] + coco["scores"]["Bleu_4"], **coco["scores"]}
        if all("blind" in one for one in answers):
            result["blind"] = caption_scores(references, {one["image_id"]: one["blind"] for one in answers})["scores"]
            scores["blind CIDEr"] = result["blind"]["CIDEr"]
        return result, scores


class ImageSwapper:
    """Pairs every text of a stream of batches with another image, for the blind baseline.

    Each image gets what the image before it shows, and the first one what a later one shows. So every image but
    perhaps the last is shown exactly once, and never with its own texts. What is left of the score is what the texts
    and the distribution of images give away.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None

    def swap(self, samples: Mapping[str, Any]) -> dict[str, Any] | None:
        """The batch with other images; None if no other is known: it is the first batch, and all of it is one image."""
        pool = [
            {"id": int(name), **{key: samples[key][index] for key in IMAGE_KEYS if key in samples}}
            for index, name in enumerate(samples["image_id"])
        ]
        earlier = [] if self._last is None else [self._last]
        chosen = []
        for index, own in enumerate(pool):  # the nearest earlier image with another id, else the nearest later one
            nearest = [*reversed([*earlier, *pool[:index]]), *pool[index:]]
            chosen += [one for one in nearest if one["id"] != own["id"]][:1]
        if len(chosen) < len(pool):
            return None
        self._last = pool[-1]
        swapped: dict[str, Any] = {key: [one[key] for one in chosen] for key in pool[0] if key != "id"}
        if "image" in swapped:
            swapped["image"] = torch.stack(swapped["image"])  # (B, 3, S, S) uint8, or (B, 4, S, S)
        return {**{key: value for key, value in samples.items() if key != PREPARED}, **swapped}


def _error_of(answer: str, where: str) -> dict[str, str]:
    """What a record has more where there is no answer; it is logged as well."""
    if not isinstance(answer, NoAnswer):
        return {}
    logging.warning("%s was not answered: %s", where, answer.error)
    return {"error": answer.error}


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)
