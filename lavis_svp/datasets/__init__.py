"""Referring-expression data in the RefCOCO format, from picture files and sentences to samples.

Only ``builders.py`` needs LAVIS; the reader (``refcoco.py``) needs neither LAVIS nor torch.
"""
