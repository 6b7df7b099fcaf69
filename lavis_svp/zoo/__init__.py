"""Zoo of weights: names with source, hashes, licence and conversion. Its command: ``python -m lavis_svp.zoo``."""

from lavis_svp.zoo.architectures import PUBLISHED, Weights, model_config
from lavis_svp.zoo.archive import PublishedArchive
from lavis_svp.zoo.download import DownloadError, HashMismatchError
from lavis_svp.zoo.entries import WeightEntry, list_weights
from lavis_svp.zoo.shipped import ShippedWeights, list_shipped, shipped_file, verify_shipped
from lavis_svp.zoo.store import fetch, is_cached, resolve, verify

__all__ = [
    "PUBLISHED",
    "DownloadError",
    "HashMismatchError",
    "PublishedArchive",
    "ShippedWeights",
    "WeightEntry",
    "Weights",
    "fetch",
    "is_cached",
    "list_shipped",
    "list_weights",
    "model_config",
    "resolve",
    "shipped_file",
    "verify",
    "verify_shipped",
]
