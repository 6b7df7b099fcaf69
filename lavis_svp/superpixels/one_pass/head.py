"""The boundary head: from SAM's embedding and the image at stride 4 to boundaries and affinities of regions."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

EMBEDDING_CHANNELS = 256
EMBEDDING_STRIDE = 16
"""Pixels of SAM's input along a cell of its embedding."""

AFFINITY_STRIDE = 8
"""Pixels of SAM's input along a cell of the affinities."""

STRIDE = 4
"""Pixels of SAM's input along a cell of the boundary map, and of the image that the head reads."""

UPSCALED = (64, 32)
"""Channels of SAM's up-scaler at strides 8 and 4."""

LEVELS = 5
"""Nested maps that the labels come from, coarse to fine; a channel of boundaries for each."""


class HeadOutput(NamedTuple):
    """What the head says of B images.

    Args:
        boundaries: (B, L, 4 h, 4 w) logits: does a boundary of a map run through a cell? The coarsest map first.
        affinities: (B, D, 2 h, 2 w): two cells lie in one region of as many maps as ``exp(-|a - b|^2)`` of theirs says.
    """

    boundaries: Tensor
    affinities: Tensor


class _Block(nn.Sequential):
    """Convolution, norm, ReLU; or none of the latter."""

    def __init__(self, channels: int, out: int, kernel: int, relu: bool = True) -> None:
        last = nn.ReLU(inplace=True) if relu else nn.Identity()
        super().__init__(nn.Conv2d(channels, out, kernel, padding=kernel // 2), nn.BatchNorm2d(out), last)

    def fold(self) -> None:
        """Make the norm a part of the convolution."""
        convolution, norm = self[0], self[1]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            self[0], self[1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()


class BoundaryHead(nn.Module):
    """Boundaries of regions at several levels of detail, from what SAM's image encoder has made already.

    Three things come together. The embedding is enlarged to stride 8, where most of the work is done, since it is cheap
    there. So is it by SAM's own up-scaler, whose features the mask decoder multiplies its masks from: it is frozen, and
    its weights are a part of the head, so that SAM's decoder is not needed. The image comes in with 2 x 2 cells as
    channels, and once more at stride 4, for thin things, which do not survive stride 8. All are convolutions, so any
    side goes, and no image depends on another.

    Args:
        coarse: channels at stride 16.
        width: channels at stride 8.
        fine: channels at stride 4.
        levels: L, channels of the boundaries.
        affinities: D, channels of the affinities.
    """

    def __init__(
        self, coarse: int = 96, width: int = 48, fine: int = 16, levels: int = LEVELS, affinities: int = 8
    ) -> None:
        super().__init__()
        self.shape = {"coarse": coarse, "width": width, "fine": fine, "levels": levels, "affinities": affinities}
        at8, at4 = UPSCALED
        self.upscaler = nn.Sequential(
            nn.ConvTranspose2d(EMBEDDING_CHANNELS, at8, 2, 2), LayerNorm2d(at8), nn.GELU(),
            nn.ConvTranspose2d(at8, at4, 2, 2), nn.GELU(),
        ).requires_grad_(False)  # fmt: skip
        self.reduce = nn.Sequential(_Block(EMBEDDING_CHANNELS, coarse, 1), _Block(coarse, coarse, 3))
        self.enlarge = nn.ConvTranspose2d(coarse, width, 2, 2)
        self.upscaled8 = _Block(at8, width, 1, relu=False)
        self.image8 = _Block(3 * 4, width, 3)
        self.middle = nn.Sequential(_Block(2 * width, width, 3), _Block(width, width, 3), _Block(width, width, 3))
        self.spread = nn.Conv2d(width, 4 * fine, 1)
        self.affinities = nn.Conv2d(width, affinities, 1)
        self.upscaled4 = _Block(at4, fine, 1, relu=False)
        self.image4 = _Block(3, fine, 3)
        self.boundaries = nn.Sequential(_Block(2 * fine, fine, 3), nn.Conv2d(fine, levels, 3, padding=1))

    def copy_upscaler(self, upscaler: nn.Module) -> None:
        """Take over the weights of SAM's ``mask_decoder.output_upscaling``, which has the same layers."""
        self.upscaler.load_state_dict(upscaler.state_dict())

    def forward(self, embedding: Tensor, image: Tensor) -> HeadOutput:
        """Find boundaries and affinities.

        Args:
            embedding: (B, 256, h, w) SAM's.
            image: (B, 3, 4 h, 4 w) RGB in 0..1 at stride 4, zeros in the padding.
        """
        image = image * 2.0 - 1.0
        sam8 = self.upscaler[:3](embedding)  # (B, 64, 2 h, 2 w)
        sam4 = self.upscaler[3:](sam8)  # (B, 32, 4 h, 4 w)
        coarse = self.enlarge(self.reduce(embedding)) + self.upscaled8(sam8)  # (B, C, 2 h, 2 w)
        local = self.image8(functional.pixel_unshuffle(image, 2))  # (B, C, 2 h, 2 w)
        middle = self.middle(torch.cat([coarse, local], dim=1))  # (B, C, 2 h, 2 w)
        fine = functional.pixel_shuffle(self.spread(middle), 2) + self.upscaled4(sam4)  # (B, F, 4 h, 4 w)
        boundaries = self.boundaries(torch.cat([fine, self.image4(image)], dim=1))  # (B, L, 4 h, 4 w)
        return HeadOutput(boundaries, self.affinities(middle))

    def folded(self) -> BoundaryHead:
        """A copy for inference: its norms, which are fixed then, are part of the convolutions before them."""
        head = copy.deepcopy(self).eval()
        for module in head.modules():
            if isinstance(module, _Block):
                module.fold()
        return head.requires_grad_(False)


def boundary_strength(boundaries: Tensor) -> Tensor:
    """The share of the L maps with a boundary in a cell, as expected: (B, 4 h, 4 w) in 0..1 of logits (B, L, ...)."""
    return boundaries.float().sigmoid().mean(dim=1)
