"""The scores of a group of expressions: gIoU, cIoU, Pr@X, N-acc, T-acc, and diagnostic scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap, cluster_sums, ratio_interval
from lavis_svp.metrics.masks import iou
from lavis_svp.metrics.records import Record

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

REACHABLE_IOU = 0.5
"""An expression is within the superpixels' reach if its best single region has at least this IoU."""


HALF = 0.5
"""``pick_inside`` counts the picks with at least this share of their region in the target: unlike ``pick_accuracy``, it
does not forgive a coarse region that is the best there is."""


def image_of(record: Record) -> tuple[Any, Any]:
    """The key of a record's image; it holds the file name too, because data sets may reuse image ids."""
    return record["image_id"], record["file_name"]


def ious(records: Iterable[Record]) -> np.ndarray:
    """IoU of each record, (N,) float64, by gRefCOCO's convention (ReLA).

    No target and an empty prediction: 1. No target and pixels predicted: 0. A target and an empty prediction: 0.
    Otherwise intersection over union.
    """
    return np.array([iou(record["intersection"], record["union"]) for record in records], np.float64)


def giou(records: Sequence[Record]) -> float | None:
    """gIoU: mean IoU over expressions, those without a target included. None without records."""
    return mean(ious(records))


def ciou(records: Iterable[Record]) -> float | None:
    """cIoU: the sum of all intersections over the sum of all unions, in exact integers.

    An empty target adds the predicted area to the union. None if all unions are empty.
    """
    rows = list(records)
    total = sum(record["union"] for record in rows)
    return sum(record["intersection"] for record in rows) / total if total else None


def precision_at(records: Iterable[Record], threshold: float) -> float | None:
    """Pr@X: share of the expressions with a target whose IoU is at least ``threshold``."""
    return mean(ious(record for record in records if record["has_target"]) >= threshold)


def group_scores(records: Sequence[Record], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> dict[str, Any]:
    """Compute all scores of one group of expressions; a score that the group does not define is None.

    Args:
        records: of one mode (see ``records.records_of_mode``).
        bootstrap: of the intervals, which resample images.
    """
    targets = [record for record in records if record["has_target"]]
    empty = [record for record in records if not record["has_target"]]
    picks = _values(targets, "pick_correct")
    with_ceiling = _having(targets, "ceiling_single")
    within = [record for record in with_ceiling if record["ceiling_single"] >= REACHABLE_IOU]
    times = _values(records, "ms")
    tokens = {image_of(record): record["tokens"] for record in _having(records, "tokens")}
    return {
        "n": len(records),
        "n_images": len({image_of(record) for record in records}),
        "n_target": len(targets),
        "giou": giou(records),
        "giou_ci": giou_interval(records, bootstrap=bootstrap),
        "ciou": ciou(records),
        "ciou_ci": ciou_interval(records, bootstrap=bootstrap),
        **{f"pr@{threshold}": precision_at(records, threshold) for threshold in PRECISION_THRESHOLDS},
        "n_acc": mean([record["pred_area"] == 0 for record in empty]),  # rightly left empty
        "t_acc": mean([record["pred_area"] > 0 for record in targets]),  # not left empty, right or wrong
        "seg_miss_rate": mean([not record["answered"] for record in targets]),  # always 0 when teacher-forced
        "pick_accuracy": mean(picks),
        "n_picks": len(picks),
        "pick_inside": mean([share >= HALF for share in _values(targets, "pick_inside")]),
        "ceiling_single": mean(_values(targets, "ceiling_single")),
        "ceiling_union": mean(_values(targets, "ceiling_union")),
        "reachable_share": len(within) / len(with_ceiling) if with_ceiling else None,
        "reachable_n": len(within),
        "reachable_giou": giou(within),
        "reachable_pr@0.5": precision_at(within, REACHABLE_IOU),
        "baseline_random": mean(_values(targets, "baseline_random")),
        "baseline_attribute": mean(_values(targets, "baseline_attribute")),
        "tokens_per_image": mean(list(tokens.values())),
        "ms_per_expression": mean(times),
        "ms_per_expression_median": float(np.median(times)) if times else None,
    }


def giou_interval(
    records: Sequence[Record], groups: Sequence[str] | None = None, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> tuple[float, float] | None:
    """Bootstrap interval of gIoU; with ``groups`` (a name for each record), of the mean of the groups' gIoUs."""
    return _interval(records, ious(records), np.ones(len(records)), groups, bootstrap)


def ciou_interval(
    records: Sequence[Record], groups: Sequence[str] | None = None, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> tuple[float, float] | None:
    """Bootstrap interval of cIoU; arguments as for :func:`giou_interval`."""
    intersections = np.array([record["intersection"] for record in records], np.float64)
    unions = np.array([record["union"] for record in records], np.float64)
    return _interval(records, intersections, unions, groups, bootstrap)


def mean(values: Sequence[float] | np.ndarray) -> float | None:
    """Arithmetic mean in float64; None without values."""
    return float(np.mean(np.asarray(values, np.float64))) if len(values) else None


def _interval(
    records: Sequence[Record],
    numerators: np.ndarray,
    denominators: np.ndarray,
    groups: Sequence[str] | None,
    bootstrap: Bootstrap,
) -> tuple[float, float] | None:
    images = [image_of(record) for record in records]
    return ratio_interval(
        cluster_sums(numerators, images, groups), cluster_sums(denominators, images, groups), bootstrap
    )


def _having(records: Iterable[Record], key: str) -> list[Record]:
    return [record for record in records if record.get(key) is not None]


def _values(records: Iterable[Record], key: str) -> list[Any]:
    return [record[key] for record in _having(records, key)]
