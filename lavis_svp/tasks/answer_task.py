"""What the tasks of answering in words share: ask, gather, write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import is_main_process
from lavis.datasets.data_utils import prepare_sample
from tqdm import tqdm

from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.metrics.files import write_json, write_records
from lavis_svp.tasks.facts import run_facts
from lavis_svp.tasks.gather import gather_records
from lavis_svp.tasks.other_images import OtherImages
from lavis_svp.tasks.svp_task import SvpTask, result_folder

Answer = dict[str, Any]
"""One text of one image and what the model said."""


@dataclass(frozen=True)
class AnswerEvalOptions:
    """``run.eval`` of ``svp_vqa`` and ``svp_captioning``.

    Args:
        blind: also put every text to the model with another image, which takes twice as long: what is left of the
            score then does not come from the image.
        bootstrap: of the confidence intervals: ``resamples``, ``seed``, ``level``.
    """

    blind: bool = False
    bootstrap: Bootstrap = Bootstrap()


class AnswerTask(SvpTask):
    """Asks, and writes what was said; the sub-classes score it.

    Evaluating split S at epoch E writes, under the runner's result folder, ``S_E.jsonl`` (one line a text),
    ``S_E_result.json`` (the official results format) and ``S_E.summary.json``.

    Args:
        options: of the evaluation.
        settings: of the run, to stand in the summary.
    """

    options_cls = AnswerEvalOptions
    options: AnswerEvalOptions

    def ask(self, model: Any, samples: Mapping[str, Any]) -> list[Any]:
        """What the model says: B texts, or B lists of texts."""
        raise NotImplementedError

    def official(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The answers in the official results format."""
        raise NotImplementedError

    def score(self, answers: Sequence[Answer]) -> tuple[dict[str, Any], dict[str, float]]:
        """The summary, and flat numbers for the log with ``agg_metrics``."""
        raise NotImplementedError

    def valid_step(self, model: Any, samples: Mapping[str, Any]) -> list[Answer]:
        """Ask about a batch.

        Args:
            model: not wrapped in DDP.
            samples: a batch as the data sets collate it.

        Returns:
            one entry per text.
        """
        start = time.perf_counter()
        said = _lists(self.ask(model, samples))
        count = sum(map(len, said))
        ms = 1000 * (time.perf_counter() - start) / max(1, count)
        return [
            {
                "id": name,
                "image_id": int(samples["image_id"][index]),
                "file_name": samples["file_name"][index],
                "kind": kind,
                "question": question,
                "answer": answer,
                "ms": ms,
            }
            for index, answers in enumerate(said)
            for name, kind, question, answer in zip(
                samples["expression_ids"][index],
                samples["kinds"][index],
                _list(samples["text_input"][index]),
                answers,
                strict=True,
            )
        ]

    @torch.no_grad()
    def evaluation(self, model: Any, data_loader: Iterable[Any], cuda_enabled: bool = True) -> list[Answer]:
        """Ask about this process's share of a split.

        Args:
            model: as for :meth:`valid_step`.
            data_loader: gives batches.
            cuda_enabled: move batches to CUDA.

        Raises:
            ValueError: the blind baseline finds no other image in the first batch.
        """
        answers: list[Answer] = []
        others = OtherImages()
        for batch in tqdm(data_loader, desc="Asking", unit="batch", mininterval=1, disable=not is_main_process()):
            samples = prepare_sample(batch, cuda_enabled=cuda_enabled)
            given = self.valid_step(model, samples)
            if self.options.blind:
                swapped = others.swap(samples)
                if swapped is None:
                    raise ValueError(
                        "run.eval.blind needs another image in the first batch: raise run.batch_size_eval."
                    )
                blind = [answer for said in _lists(self.ask(model, swapped)) for answer in said]
                given = [{**one, "blind": other} for one, other in zip(given, blind, strict=True)]
            answers += given
        return answers

    def after_evaluation(
        self, val_result: list[Answer], split_name: str, epoch: int | str, **kwargs: Any
    ) -> dict[str, Any]:
        """Join all processes' answers, score them and write the result files.

        Args:
            val_result: this process's answers.
            split_name: of the split in LAVIS.
            epoch: epoch, iteration or "best"; goes into the file names.
            kwargs: what other runners may pass; not used.

        Returns:
            ``agg_metrics`` and more scores for the log, on every process.

        Raises:
            ValueError: a text of the split was not answered.
        """
        answers = self._merged(gather_records(val_result))
        result, scores = self.score(answers)
        if is_main_process():
            folder, stem = result_folder("result_dir"), f"{split_name}_{epoch}"
            write_records(folder / f"{stem}.jsonl", answers)
            _write_list(folder / f"{stem}_result.json", self.official(answers))
            facts = {"split": split_name, "epoch": epoch, **self.settings, **run_facts(), "asked": self.asked_with()}
            write_json(folder / f"{stem}.summary.json", {"run": facts, **result})
            with open(result_folder("output_dir") / "evaluate.txt", "a", encoding="utf-8") as log:
                log.write(json.dumps({"split": split_name, "epoch": epoch, **scores}) + "\n")
            print("\n".join(f"{name:>24}  {value:.4g}" for name, value in scores.items()), flush=True)
            print(f"Answers and summary: {folder}", flush=True)
        return scores

    def asked_with(self) -> dict[str, Any]:
        """The settings of generation, for the summary."""
        return {}

    def truth(self) -> tuple[Path, ...]:
        """The files of the split that is evaluated; see ``AnsweringDataset.ground_truth``."""
        return tuple(getattr(self._dataset, "ground_truth", ()))

    def run_value(self, key: str, default: Any) -> Any:
        """A key of the run section."""
        value = (self.run_cfg or {}).get(key)
        return default if value is None else value

    def _merged(self, parts: Iterable[Sequence[Answer]]) -> list[Answer]:
        by_id = {one["id"]: one for part in parts for one in part}
        expected = self._dataset.expression_ids() if hasattr(self._dataset, "expression_ids") else list(by_id)
        missing = [name for name in expected if name not in by_id]
        if missing:
            raise ValueError(f"{len(missing)} of {len(expected)} texts were not answered, such as {missing[:3]}.")
        return [by_id[name] for name in expected]


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _lists(values: Sequence[Any]) -> list[list[Any]]:
    return [_list(value) for value in values]


def _write_list(path: Path, content: list[dict[str, Any]]) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(path)
