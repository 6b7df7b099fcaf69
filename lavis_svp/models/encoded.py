"""Images on their way through the model: what the frozen half made of them, and their visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_svp.language.splice import VisualPositions
from lavis_svp.models.frozen import VisionFeatures
from lavis_svp.projectors.structures import Superpixels, VisualTokens


@dataclass
class Encoded:
    """Frozen inputs and visual tokens of a batch."""

    frozen: VisionFeatures
    superpixels: Superpixels | None
    visual: VisualTokens
    outlines: Superpixels | None = None  # the same superpixels with masks fine enough to prompt SAM; see pointer_mask
    positions: list[VisualPositions] | None = None  # of the visual tokens; None: one after another

    @property
    def counts(self) -> list[int]:
        """Real visual tokens of each image."""
        return [int(n) for n in self.visual.valid.sum(1)]
