"""Referring data in webdataset shards: written from any source, read by an index in any order, or streamed."""
