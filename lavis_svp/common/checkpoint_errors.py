"""What can be wrong with a checkpoint."""

from __future__ import annotations


class CorruptCheckpointError(ValueError):
    """A file or folder that is no complete checkpoint."""


class WrongCheckpointError(ValueError):
    """A sound checkpoint, but of another model."""
