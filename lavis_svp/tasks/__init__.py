"""LAVIS tasks: how a model is trained, evaluated and drawn. Importing this package imports LAVIS first."""
