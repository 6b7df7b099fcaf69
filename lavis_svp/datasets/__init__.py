"""Images with texts, from files to samples: referring expressions in the RefCOCO format, questions, captions.

Only ``builders.py`` and ``answering_builders.py`` need LAVIS; the readers (``refcoco.py``, ``text_sources.py``) need
neither LAVIS nor torch.
"""
