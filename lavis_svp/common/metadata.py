"""What a safetensors file says of itself."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lavis_svp.common.checkpoint_errors import CorruptCheckpointError


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        CorruptCheckpointError: it is none, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CorruptCheckpointError(f"{path} is no complete safetensors file: {error}") from error
