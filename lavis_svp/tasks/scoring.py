"""From a model's predictions to records: one JSON-able dict per expression."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lavis_svp.metrics.masks import mask_counts
from lavis_svp.metrics.records import Record
from lavis_svp.metrics.regions import attribute_reader_iou, pick_correct, random_object_iou
from lavis_svp.superpixels.ceiling import single_ceiling, union_ceiling
from lavis_svp.superpixels.region_map import RegionMap

ANSWER_FIELDS = (
    "answered",
    "text",
    "intersection",
    "union",
    "pred_area",
    "score",
    "tokens",
    "pick_correct",
    "ms",
)
"""Fields of a record that depend on the mode; the others describe the expression."""


class Prediction(Protocol):
    """A model's answer to one expression; see ``MaskPrediction`` of the model."""

    mask: np.ndarray
    score: float
    answered: bool
    text: str
    pick: int | None
    region_map: RegionMap | None
    tokens: int


class SegmentationModel(Protocol):
    """What the task asks of a model in evaluation."""

    def predict_masks(self, samples: Mapping[str, Any], mode: str) -> Sequence[Sequence[Prediction]]:
        """One prediction for each expression of each image."""


def timed_predictions(
    model: SegmentationModel, samples: Mapping[str, Any], mode: str
) -> tuple[Sequence[Sequence[Prediction]], float]:
    """Ask the model, and check that it answered every expression.

    Args:
        model: not wrapped in DDP.
        samples: a batch.
        mode: "generative" or "teacher_forced".

    Returns:
        the predictions, and the wall time of an expression in milliseconds: that of the batch, shared evenly.
        What a cache provides (superpixels, frozen features) is not in it.

    Raises:
        ValueError: the predictions do not pair up with the expressions.
    """
    _wait_for_cuda()
    start = time.perf_counter()
    predictions = model.predict_masks(samples, mode=mode)
    _wait_for_cuda()
    seconds = time.perf_counter() - start
    asked = [len(texts) for texts in samples["text_input"]]
    given = [len(one) for one in predictions]
    if asked != given:
        raise ValueError(f"The images of a batch have {asked} expressions, but the model answered {given}.")
    return predictions, 1000 * seconds / max(1, sum(asked))


def score_image(
    samples: Mapping[str, Any], index: int, predictions: Sequence[Prediction], mode: str, ms: float
) -> list[Record]:
    """Score one image's predictions at its original size.

    Args:
        samples: a batch, as the data sets collate it.
        index: of the image in the batch.
        predictions: one for each of its expressions.
        mode: "generative" or "teacher_forced".
        ms: wall time of an expression.

    Raises:
        ValueError: a mask of another size than the image or with other values than 0 and 1, an answer that says
            there is no mask and gives one, or a pick that is no region. The message names the expression.
    """
    return [
        _score_expression(samples, index, number, prediction, mode, ms) for number, prediction in enumerate(predictions)
    ]


def beside(main: Record, other: Record) -> Record:
    """One record of both modes: ``main``'s, with what differs in ``other`` under the name of its mode."""
    return {**main, other["mode"]: {key: other[key] for key in ANSWER_FIELDS}}


def _score_expression(
    samples: Mapping[str, Any], index: int, number: int, prediction: Prediction, mode: str, ms: float
) -> Record:
    name = samples["expression_ids"][index][number]
    target = samples["masks"][index][number]
    where = f"Expression {name} of {samples['file_name'][index]}: "
    try:
        counts = mask_counts(prediction.mask, target)
        facts = _facts_of_regions(_region_map(samples, index, prediction), prediction.pick, target)
    except ValueError as error:
        raise ValueError(where + str(error)) from error
    if counts.pred_area and not prediction.answered:
        raise ValueError(f"{where}the model answered without [SEG], yet gave a mask of {counts.pred_area} pixels.")
    if bool(samples["has_target"][index][number]) != (counts.gt_area > 0):
        logging.warning("%sits true mask has %d pixels; that counts, not has_target.", where, counts.gt_area)
    return {
        "expression_id": name,
        "image_id": samples["image_id"][index],
        "file_name": samples["file_name"][index],
        "split": samples["split"][index] if "split" in samples else "",
        "kind": samples["kinds"][index][number],
        "expression": samples["text_input"][index][number],
        "has_target": counts.gt_area > 0,
        "mode": mode,
        "answered": bool(prediction.answered),
        "text": prediction.text,
        **counts._asdict(),
        "score": _finite(prediction.score),
        "tokens": int(prediction.tokens),
        **facts,
        **_baselines(samples, index, number),
        "ms": ms,
    }


def _region_map(samples: Mapping[str, Any], index: int, prediction: Prediction) -> RegionMap | None:
    """The superpixels that the model used; for one that uses none, those of the cache."""
    if prediction.region_map is not None:
        return prediction.region_map
    return samples["region_map"][index] if "region_map" in samples else None


def _facts_of_regions(regions: RegionMap | None, pick: int | None, target: np.ndarray) -> dict[str, Any]:
    """Whether the picked region is right, and what the superpixels allow; None without superpixels or target."""
    unknown = {"pick_correct": None, "ceiling_single": None, "ceiling_union": None}
    if regions is None or not np.any(target):
        return unknown
    try:
        fitted = regions.resized((target.shape[0], target.shape[1]))
    except ValueError:  # fewer pixels than superpixels: an image of a few pixels
        return unknown
    return {
        "pick_correct": None if pick is None else pick_correct(fitted.labels, fitted.count, pick, target),
        "ceiling_single": single_ceiling(fitted, target)[0],
        "ceiling_union": union_ceiling(fitted, target)[0],
    }


def _baselines(samples: Mapping[str, Any], index: int, number: int) -> dict[str, float | None]:
    """What answers without a sense of position would reach; None where the data set does not tell."""
    instances = samples["instances"][index] if samples.get("instances") else None
    if instances is None:
        return {"baseline_random": None, "baseline_attribute": None}
    labels, target = instances["labels"], samples["masks"][index][number]
    candidates = samples["candidates"][index] if samples.get("candidates") else None
    alike = None if candidates is None else candidates[number]
    return {
        "baseline_random": random_object_iou(labels, target),
        "baseline_attribute": None if alike is None else attribute_reader_iou(labels, target, alike),
    }


def _finite(score: float) -> float | None:
    """A score as JSON knows it: a diverged model's NaN becomes None."""
    value = float(score)
    return value if math.isfinite(value) else None


def _wait_for_cuda() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
