"""Zoo of weights: names with source, hashes, licence and converter. Its command is ``lavis-svp zoo``."""

from lavis_svp.zoo.architectures import CLASSIFIERS, PUBLISHED, Weights, model_config
from lavis_svp.zoo.entries import PublishedArchive, WeightEntry, list_weights
from lavis_svp.zoo.published import load_published, read_published
from lavis_svp.zoo.shipped import ShippedWeights, list_shipped, shipped_file, verify_shipped
from lavis_svp.zoo.store import DownloadError, HashMismatchError, check_name, fetch, is_cached, resolve, verify

__all__ = [
    "CLASSIFIERS",
    "PUBLISHED",
    "DownloadError",
    "HashMismatchError",
    "PublishedArchive",
    "ShippedWeights",
    "WeightEntry",
    "Weights",
    "check_name",
    "fetch",
    "is_cached",
    "list_shipped",
    "list_weights",
    "load_published",
    "model_config",
    "read_published",
    "resolve",
    "shipped_file",
    "verify",
    "verify_shipped",
]
