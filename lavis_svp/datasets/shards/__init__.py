"""Referring data in webdataset shards: ``format`` (files, records, index), ``write``, ``read``, ``validate``."""
