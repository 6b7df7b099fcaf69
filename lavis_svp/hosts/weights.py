"""What a swapped projector starts from: the host's own projector where the layers coincide."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from lavis_svp.projectors import Projector


def carry_head(projector: Projector, linears: Sequence[nn.Linear]) -> list[str]:
    """Copy the host's two linear layers into the projector's shared head, if they are the same layers.

    With ``mlp`` the swapped model then computes what it did before; `mask_pool`, `svp` and the others start from a
    head that already speaks the language model's language.

    Args:
        projector: just built.
        linears: of the host's projector, in order.

    Returns:
        names of the parameters that are new, everything the host did not have.
    """
    head = getattr(projector, "head", None)
    own = [layer for layer in head if isinstance(layer, nn.Linear)] if isinstance(head, nn.Sequential) else []
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in own]
    if not own or shapes != [[tuple(p.shape) for p in layer.parameters()] for layer in linears]:
        return [name for name, _ in projector.named_parameters()]
    with torch.no_grad():
        for mine, theirs in zip(own, linears, strict=True):
            for target, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                target.copy_(source)
    carried = {id(p) for layer in own for p in layer.parameters()}
    return [name for name, p in projector.named_parameters() if id(p) not in carried]


def report_new(host: str, projector: Projector, new: Sequence[str]) -> None:
    """Log which parameters the swap left untrained."""
    total = sum(p.numel() for p in projector.parameters())
    untrained = sum(p.numel() for name, p in projector.named_parameters() if name in set(new))
    logging.info(
        "%s: projector '%s' has %d parameters, %d of them new and untrained: %s",
        host,
        projector.name,
        total,
        untrained,
        ", ".join(new) or "none",
    )
