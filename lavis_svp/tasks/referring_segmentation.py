"""LAVIS task: segment what an expression refers to, and score the masks.

The main scores, ``headline`` in the summary's JSON, are averages over the kinds of expression (``…_macro``) or over the
expressions (``…_micro``) that have a target. "Pick" is the superpixel that the model chose.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.dist_utils import get_rank, is_main_process
from lavis.common.registry import registry
from tqdm import tqdm

from lavis_svp.common.options import check_whole_number
from lavis_svp.common.registry import unknown_name
from lavis_svp.common.transfer import move_to_device
from lavis_svp.metrics import format_summary, merge_records, summary
from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.metrics.records import MODES, Record, record_line
from lavis_svp.models.batch import PREPARED
from lavis_svp.tasks.base import SvpTask, device_of, gather_records, result_folder
from lavis_svp.tasks.gallery import Gallery
from lavis_svp.tasks.scoring import merge_modes, predictions_by_mode, score_image
from lavis_svp.vision.geometry import sam_input_size

LOGGED = ("giou_macro", "giou_micro", "ciou_macro", "ciou_micro", "pick_accuracy_macro")
"""Main scores that LAVIS's log shows next to ``agg_metrics``."""

EVAL_MODES = (*MODES, "both")


@dataclass(frozen=True)
class EvalOptions:
    """``run.eval``: how a split is evaluated. Which expressions count (the protocol) is a setting of the data set.

    Args:
        mode: ``generative`` (the model writes its answer; without ``[SEG]`` there is no mask), ``teacher_forced`` (the
            answer with ``[SEG]`` is fed to it) or ``both``, which reports both side by side; images are encoded once.
        num_visualise: number of expressions to draw, spread over the kinds; 0 = none.
        bootstrap: of the confidence intervals: ``resamples``, ``seed``, ``level``.
    """

    mode: str = "generative"
    num_visualise: int = 12
    bootstrap: Bootstrap = Bootstrap()

    def __post_init__(self) -> None:
        if self.mode not in EVAL_MODES:
            raise unknown_name("evaluation mode (run.eval.mode)", self.mode, EVAL_MODES)
        check_whole_number("run.eval.num_visualise", self.num_visualise, 0)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes to run, first the one of the main scores."""
        return MODES if self.mode == "both" else (self.mode,)


@registry.register_task("referring_segmentation")
class ReferringSegmentationTask(SvpTask):
    """Trains and scores models that have ``predict_masks``.

    In the YAML: ``run.task: referring_segmentation`` and, optionally, ``run.eval`` (see :class:`EvalOptions`).
    Evaluating split S with tag E (epoch and step) writes, under the runner's result folder, ``S_E.jsonl`` (one line per
    expression), ``S_E.summary.json`` and ``images/S/``; while it runs, lines go to ``unfinished_rank<R>.jsonl``.
    """

    options_cls = EvalOptions
    options: EvalOptions

    def __init__(self, options: EvalOptions | None = None, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(options, settings)
        self._gallery = Gallery(self.options.num_visualise)
        self.drawn_images: list[Path] = []  # of the last evaluation, in the main process
        self._inputs_cached = False

    def valid_step(self, model: Any, samples: Mapping[str, Any]) -> list[Record]:
        """Predict and score a batch with ``masks``; the model is not wrapped in DDP.

        Returns:
            one record per expression; with mode "both", its field ``teacher_forced`` holds the teacher-forced result.
        """
        return [record for record, _, _, _ in self._scored(model, samples)]

    @torch.no_grad()
    def evaluation(self, model: Any, data_loader: Iterable[Any], cuda_enabled: bool = True) -> list[Record]:
        """Score this process's share of a split; write each record at once, and draw some.

        Args:
            model: not wrapped; its device is where the batches go.
            data_loader: of the split.
            cuda_enabled: LAVIS's, not used: its ``.cuda()`` would be the first GPU.
        """
        device = device_of(model)
        is_main = is_main_process()
        self._gallery = Gallery(self.options.num_visualise if is_main else 0)
        records: list[Record] = []
        path = self._unfinished()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as lines:
            looks = {"desc": "Evaluating", "unit": "batch", "mininterval": 1, "disable": not is_main}
            for batch in tqdm(data_loader, **looks):
                samples = move_to_device(batch, device)
                self._inputs_cached = features_cached(samples)
                for record, index, number, prediction in self._scored(model, samples):
                    truth = samples["masks"][index][number]
                    self._gallery.offer(record, partial(self._image, samples, index), prediction, truth)
                    records.append(record)
                    lines.write(record_line(record))
                lines.flush()
        return records

    def after_evaluation(
        self, val_result: list[Record], split_name: str, epoch: int | str, **kwargs: Any
    ) -> dict[str, Any]:
        """Join all processes' records, write the result files and print the table.

        Args:
            val_result: this process's records.
            split_name: of the split in LAVIS.
            epoch: tag of the weights, epoch and step from our runners; goes into the file names.
            kwargs: arguments of other runners, not used.

        Returns:
            ``agg_metrics`` (the main gIoU: the macro average over the kinds with a target; where no expression has
            one, gIoU over all) and more scores for the log, on every process.

        Raises:
            ValueError: an expression of the split was not scored, or one that is not of the split was.
        """
        with_split = [{**record, "split": record["split"] or split_name} for record in val_result]
        records = merge_records(gather_records(with_split), self._expected_ids(split_name))
        result = summary(records, self.options.bootstrap)
        scores = _for_log(result)
        if is_main_process():
            run_info = {"eval_mode": self.options.mode, "times_exclude_frozen_encoders": self._inputs_cached}
            self._write_result(split_name, epoch, records, result, scores, **run_info)
            self.drawn_images = self._gallery.save(result_folder("result_dir") / "images" / split_name)
            print(format_summary(result, split_name), flush=True)
            print(f"Records, summary and images: {result_folder('result_dir')}", flush=True)
        self._unfinished().unlink(missing_ok=True)
        return scores

    def _scored(self, model: Any, samples: Mapping[str, Any]) -> Iterable[tuple[Record, int, int, Any]]:
        """Yield each record with its image index, expression index and main prediction."""
        answers = predictions_by_mode(model, samples, self.options.modes)
        for index, predictions in enumerate(answers[0][1]):
            by_mode = [score_image(samples, index, rows[index], mode, ms) for mode, rows, ms in answers]
            for number, prediction in enumerate(predictions):
                first, *others = (rows[number] for rows in by_mode)
                yield merge_modes(first, others[0]) if others else first, index, number, prediction

    def _expected_ids(self, split_name: str) -> list[str] | None:
        if not hasattr(self._dataset, "expression_ids"):
            logging.warning(
                "The data set of split '%s' has no expression_ids(): missing expressions cannot be detected.",
                split_name,
            )
            return None
        return list(self._dataset.expression_ids())

    def _image(self, samples: Mapping[str, Any], index: int) -> np.ndarray:
        """The image to draw on, (H, W, 3) uint8: the model's input without padding, or else the image file."""
        if "image" not in samples:
            return self._dataset.pixels(samples["image_id"][index], samples["split"][index])
        image = samples["image"][index].cpu()  # (3, S, S) uint8, or (4, S, S) with a channel that is 1 in the image
        if image.dtype == torch.uint8:
            height, width = map(int, samples["original_size"][index])
            rows, columns = sam_input_size(height, width, image.shape[-1])
            return image[:, :rows, :columns].permute(1, 2, 0).numpy()  # (H', W', 3)
        inside = image[3] > 0
        rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())
        pixels = image[:3, :rows, :columns].float().permute(1, 2, 0)  # (H', W', 3)
        return (255 * pixels.clamp(0, 1)).round().to(torch.uint8).numpy()

    def _unfinished(self) -> Path:
        return result_folder("result_dir") / f"unfinished_rank{get_rank()}.jsonl"


def features_cached(samples: Mapping[str, Any]) -> bool:
    """Whether the frozen features of a batch, prepared or not, come from a cache."""
    if PREPARED in samples:
        return samples[PREPARED].tree.images.cached is not None
    return "frozen" in samples


def _for_log(result: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers for LAVIS's log, without scores that the split does not define."""
    head, overall = result["headline"], result["overall"]
    best = head["giou_macro"] if head["giou_macro"] is not None else overall["giou"]
    scores = {"agg_metrics": best, **{name: head[name] for name in LOGGED}}
    scores |= {name: overall[name] for name in ("n", "n_acc", "seg_miss_rate", "ms_per_expression")}
    if "teacher_forced" in result:
        scores["teacher_forced_giou_macro"] = result["teacher_forced"]["headline"]["giou_macro"]
    return {name: value for name, value in scores.items() if value is not None}
