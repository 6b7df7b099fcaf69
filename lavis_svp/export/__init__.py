"""Getting weights out of a training run: ``python -m lavis_svp.export <command>``."""
