"""Scores of referring segmentation as plain functions on numpy arrays and dicts; neither LAVIS nor torch is needed."""

from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.metrics.masks import MaskCounts, attribute_reader_iou, iou, mask_counts, pick_correct, random_object_iou
from lavis_svp.metrics.records import merge_records, records_of_mode
from lavis_svp.metrics.report import format_summary, headline, summary
from lavis_svp.metrics.scores import ciou, giou, group_scores

__all__ = [
    "Bootstrap",
    "MaskCounts",
    "attribute_reader_iou",
    "ciou",
    "format_summary",
    "giou",
    "group_scores",
    "headline",
    "iou",
    "mask_counts",
    "merge_records",
    "pick_correct",
    "random_object_iou",
    "records_of_mode",
    "summary",
]
