"""Getting weights out of a training run; the command is ``lavis-svp export``."""
