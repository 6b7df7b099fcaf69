"""What Qwen's processors need for a swapped projector: grids of every size, the recipe among their settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lavis_svp.hosts.processor import ImageLayout, SwappedProcessor
from lavis_svp.hosts.qwen_tower import image_grids
from lavis_svp.projectors.structures import Grid


class QwenImages(SwappedProcessor):
    """Mixin before a Qwen's processor class.

    Args:
        image_processor: Qwen's.
        tokenizer: Qwen's.
        video_processor: Qwen's; unread.
        chat_template: Qwen's.
        svp: the recipe of the swap.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        svp: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]  # Qwen's
            image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs
        )
        self.svp = svp

    def layout(self, images: list[np.ndarray], image_inputs: Mapping[str, Any]) -> ImageLayout:
        """See :meth:`SwappedProcessor.layout`: each image is stretched over a grid of its own."""
        return ImageLayout(images, image_grids(image_inputs["image_grid_thw"]))


def usual_grid(image_processor: Any) -> Grid:
    """A square grid at the geometric mean of the fewest and the most pixels that the image processor allows.

    32 x 32 patches for the published 56 x 56 to 16384 x 28 x 28 pixels.
    """
    size = image_processor.size
    side = (size["shortest_edge"] * size["longest_edge"]) ** 0.25 / image_processor.patch_size  # in patches
    cells = max(1, math.floor(side / image_processor.merge_size + 0.5))
    return cells * image_processor.merge_size, cells * image_processor.merge_size
