"""Images with texts, from files to samples.

``sources`` is what a data set reads (start there to add a format); ``refcoco``, ``custom_formats``, ``answering`` and
``shards`` are the formats; ``referring`` is the data set; ``builders`` and ``answering_builders`` register it with
LAVIS; ``refshapes`` and ``photos`` come with the plugin. Only the builders need LAVIS.
"""
