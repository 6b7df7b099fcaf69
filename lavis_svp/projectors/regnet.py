"""A RegNet bottleneck with squeeze-and-excitation that keeps to the valid part of its input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

SQUEEZE = 4  # width over that of the squeeze; RegNetY's ratio of 1/4 (arXiv 2003.13678)


class RegNetBlock(nn.Module):
    """``silu(x + norm(1x1(se(silu(norm(dw3x3(silu(norm(1x1(x)))))))))``, channels last, all at one width.

    Norms are LayerNorms over channels, the 3x3 convolution is depthwise, ``se`` scales each channel by
    ``sigmoid(W relu(V mean))``, its mean over the valid cells (RegNet, arXiv 2003.13678; SE, arXiv 1709.01507).

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = max(1, width // SQUEEZE)
        self.expand, self.reduce = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.local = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.expand_norm, self.local_norm, self.reduce_norm = (nn.LayerNorm(width) for _ in range(3))
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: (B, H, W, C).
            inside: (B, H, W) bool; cells outside are zeros to the convolution, as beyond the border, and count for
                nothing in the mean.

        Returns:
            (B, H, W, C); what stands outside does not matter.
        """
        outside = ~inside[..., None]  # (B, H, W, 1)
        y = F.silu(self.expand_norm(self.expand(x))).masked_fill(outside, 0.0)
        y = self.local(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, C)
        y = F.silu(self.local_norm(y))
        count = inside.sum(dim=(1, 2)).clamp_min(1)[:, None]  # (B, 1)
        mean = y.masked_fill(outside, 0.0).float().sum(dim=(1, 2)) / count  # (B, C)
        gate = self.excite(F.relu(self.squeeze(mean.to(y.dtype)))).sigmoid()  # (B, C)
        return F.silu(x + self.reduce_norm(self.reduce(y * gate[:, None, None])))
