"""From picture files and raw expressions to what the model takes.

``pictures.py``, ``frame.py`` and ``text.py`` stand alone; ``svp_processors.py`` registers them with LAVIS.
"""
