"""Referring-expression data in the RefCOCO format: reading, drawing expressions, building LAVIS datasets.

Only ``builders.py`` needs LAVIS; the reader (``refcoco.py``) needs neither LAVIS nor torch.
"""
