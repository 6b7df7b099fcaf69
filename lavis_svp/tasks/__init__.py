"""LAVIS tasks: how a model is trained, scored and shown. Importing it imports LAVIS first."""
