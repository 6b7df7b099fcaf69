"""LAVIS tasks: how a model is trained, scored and shown. Importing this package imports no LAVIS."""
