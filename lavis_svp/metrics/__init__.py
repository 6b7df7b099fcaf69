"""Scores of referring segmentation. Plain functions on numpy arrays and dicts; needs neither LAVIS nor torch."""

from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.metrics.masks import MaskCounts, iou, mask_counts
from lavis_svp.metrics.records import merge_records, view
from lavis_svp.metrics.regions import attribute_reader_iou, pick_correct, random_object_iou
from lavis_svp.metrics.report import headline, summary
from lavis_svp.metrics.scores import ciou, giou, group_scores
from lavis_svp.metrics.table import format_summary

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
    "summary",
    "view",
]
