"""Turn a model's predictions into records: one JSON-able dict per expression."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lavis_svp.common.devices import wait_for
from lavis_svp.metrics.masks import attribute_reader_iou, mask_counts, pick_correct, pick_inside, random_object_iou
from lavis_svp.metrics.records import Record
from lavis_svp.models.outputs import MaskPrediction
from lavis_svp.models.texts import text_lists
from lavis_svp.superpixels.evaluation import single_ceiling, union_ceiling
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.tasks.base import device_of

ANSWER_FIELDS = (
    "answered", "text", "intersection", "union", "pred_area", "score", "tokens", "pick_correct", "pick_inside",
    "ms",
)  # fmt: skip
"""Fields of a record that depend on the mode; all others describe the expression."""


def timed_predictions(
    model: Any, samples: Mapping[str, Any], mode: str
) -> tuple[Sequence[Sequence[MaskPrediction]], float]:
    """Predict a batch in one mode; see :func:`predictions_by_mode`."""
    return predictions_by_mode(model, samples, [mode])[0][1:]


@torch.no_grad()
def predictions_by_mode(
    model: Any, samples: Mapping[str, Any], modes: Sequence[str]
) -> list[tuple[str, Sequence[Sequence[MaskPrediction]], float]]:
    """Predict a batch in some modes, and check that there is a prediction for every expression.

    The images are encoded once for several modes, if the model has ``encode`` and its ``predict_masks`` takes
    ``encoded``.

    Args:
        model: has ``predict_masks``; not wrapped in DDP.
        samples: a batch.
        modes: "generative", "teacher_forced".

    Returns:
        for each mode its name, the predictions, and the wall time per expression in milliseconds: that of the batch,
        shared evenly. It is what the mode alone takes: encoding the images counts in every mode, also where it was
        done once. What a cache provides (superpixels, frozen features) and a loader's worker does is not in it.

    Raises:
        ValueError: the predictions do not pair up with the expressions.
    """
    device = device_of(model)
    shared: dict[str, Any] = {}
    encoding = 0.0
    takes_encoded = hasattr(model, "encode") and "encoded" in inspect.signature(model.predict_masks).parameters
    if len(modes) > 1 and takes_encoded:
        encoded, encoding = _timed(lambda: model.encode(samples), device)
        shared = {"encoded": encoded}
    expected = [len(texts) for texts in text_lists(samples["text_input"], "text_input")]
    answers = []
    for mode in modes:
        predictions, seconds = _timed(functools.partial(model.predict_masks, samples, mode=mode, **shared), device)
        counts = [len(row) for row in predictions]
        if expected != counts:
            raise ValueError(f"The images of a batch have {expected} expressions, but the model answered {counts}.")
        answers.append((mode, predictions, 1000 * (encoding + seconds) / max(1, sum(expected))))
    return answers


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of some work, and its seconds with what the device did of it."""
    wait_for(device)
    start = time.perf_counter()
    result = work()
    wait_for(device)
    return result, time.perf_counter() - start


def score_image(
    samples: Mapping[str, Any], index: int, predictions: Sequence[MaskPrediction], mode: str, ms: float
) -> list[Record]:
    """Score one image's predictions at its original size.

    Args:
        samples: a batch, as the data sets collate it.
        index: of the image in the batch.
        predictions: one for each of its expressions.
        mode: "generative" or "teacher_forced".
        ms: wall time of an expression.

    Raises:
        ValueError: a mask has another size than the image or other values than 0 and 1, an answer without ``[SEG]``
            has a mask, or a pick is no region. The message names the expression.
    """
    return [
        _score_expression(samples, index, number, prediction, mode, ms) for number, prediction in enumerate(predictions)
    ]


def merge_modes(main: Record, other: Record) -> Record:
    """Join one expression's records of both modes: ``other``'s answer goes under the name of its mode."""
    return {**main, other["mode"]: {key: other[key] for key in ANSWER_FIELDS}}


def _score_expression(
    samples: Mapping[str, Any], index: int, number: int, prediction: MaskPrediction, mode: str, ms: float
) -> Record:
    name = samples["expression_ids"][index][number]
    target = samples["masks"][index][number]
    where = f"Expression {name} of {samples['file_name'][index]}: "
    regions = prediction.region_map
    if regions is None and "region_map" in samples:  # a model without superpixels: the cache's give the ceilings
        regions = samples["region_map"][index]
    try:
        counts = mask_counts(prediction.mask, target)
        region_scores = _region_scores(regions, prediction.pick, target)
    except ValueError as error:
        raise ValueError(where + str(error)) from error
    failure = getattr(prediction, "error", None)  # other models' predictions may have none
    if failure is not None:
        logging.warning("%sit was not answered, which counts as an empty mask: %s", where, failure)
    if counts.pred_area and not prediction.answered:
        raise ValueError(f"{where}the model answered without [SEG], yet gave a mask of {counts.pred_area} pixels.")
    if bool(samples["has_target"][index][number]) != (counts.gt_area > 0):
        logging.warning(
            "%sits true mask has %d pixels, which contradicts has_target; the mask counts.", where, counts.gt_area
        )
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
        "score": float(prediction.score) if math.isfinite(prediction.score) else None,  # JSON has no NaN
        "tokens": int(prediction.tokens),
        **region_scores,
        **_baselines(samples, index, number),
        "ms": ms,
        **_tags(samples, index, number),
        **({} if failure is None else {"error": failure}),
    }


def _region_scores(regions: RegionMap | None, pick: int | None, target: np.ndarray) -> dict[str, Any]:
    """Whether the picked region is right, and the ceilings that superpixels set; None without superpixels or target."""
    unknown = {"pick_correct": None, "pick_inside": None, "ceiling_single": None, "ceiling_union": None}
    if regions is None or not np.any(target):
        return unknown
    try:
        fitted = regions.resized((target.shape[0], target.shape[1]))
    except ValueError:  # the image has fewer pixels than superpixels
        return unknown
    return {
        "pick_correct": None if pick is None else pick_correct(fitted.labels, fitted.count, pick, target),
        "pick_inside": None if pick is None else pick_inside(fitted.labels, pick, target),
        "ceiling_single": single_ceiling(fitted, target)[0],
        "ceiling_union": union_ceiling(fitted, target)[0],
    }


def _tags(samples: Mapping[str, Any], index: int, number: int) -> dict[str, Any]:
    """The tags of an expression, and the share of the image that its target covers; nothing without tags."""
    tags = samples["tags"][index][number] if samples.get("tags") else None
    if not tags:
        return {}
    target = samples["masks"][index][number]
    return {"tags": dict(tags), "area_share": np.count_nonzero(target) / target.size}


def _baselines(samples: Mapping[str, Any], index: int, number: int) -> dict[str, float | None]:
    """Scores of answers that know no positions; None where the data set has no objects or candidates."""
    instances, candidates = (samples[key][index] if samples.get(key) else None for key in ("instances", "candidates"))
    if instances is None:
        return {"baseline_random": None, "baseline_attribute": None}
    labels, target = instances["labels"], samples["masks"][index][number]
    return {
        "baseline_random": random_object_iou(labels, target),
        "baseline_attribute": None if candidates is None else attribute_reader_iou(labels, target, candidates[number]),
    }
