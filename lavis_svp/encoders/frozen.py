"""A module that never trains: no gradients, and always in evaluation mode."""

from __future__ import annotations

from typing import Self

from torch import nn


class FrozenModule(nn.Module):
    """Base of the encoders.

    ``train()`` on a model that holds one leaves it in evaluation mode: MobileSAM's batch norms would otherwise
    drift, and drop-out would make cached features differ from fresh ones.
    """

    def freeze(self) -> Self:
        """Turn off gradients and drop-out, for good."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)
