"""Computing outside autocast, for sums that bfloat16 would spoil."""

from __future__ import annotations

import contextlib

import torch


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which operations on ``device`` keep their inputs' dtype, also inside an autocast region."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device, for dry runs
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
