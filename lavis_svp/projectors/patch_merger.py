"""`patch_merger`: norm, 2x2 patches side by side, MLP (Qwen2-VL, arXiv 2409.12191; Qwen2.5-VL, arXiv 2502.13923)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_svp.projectors.base import ProjectorOptions
from lavis_svp.projectors.cell_projector import CellProjector, Cells
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.structures import Grid, PatchFeatures

NORMS = ("rms", "layer")


@dataclass(frozen=True)
class PatchMergerOptions(ProjectorOptions):
    """Choices of `patch_merger`."""

    merge_size: int = 2  # r: a token a cell of r x r patches
    norm: str = "rms"  # "rms" as in Qwen2.5-VL, "layer" as in Qwen2-VL
    eps: float = 1e-6  # of the norm

    def __post_init__(self) -> None:
        if self.merge_size < 1:
            raise ValueError(f"merge_size must be at least 1, got {self.merge_size}.")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}.")
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {self.eps}.")

    @property
    def grid_multiple(self) -> int:
        """A cell's side."""
        return self.merge_size


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps)`` in float32, back in the dtype of ``x``, then the gain (arXiv 1910.07467).

    PyTorch's own rounds after the gain; this order gives Qwen2.5-VL's bits in every dtype.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm of the last axis."""
        exact = x.float()
        scale = torch.rsqrt(exact.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (exact * scale).to(x.dtype)


@register_projector("patch_merger")
class PatchMergerProjector(CellProjector):
    """Norm(C) of each patch, then Linear(r²C→r²C), GELU, Linear(r²C→D) on each cell's concatenated patches.

    Its parameters ``ln_q.*``, ``mlp.0.*`` and ``mlp.2.*`` are those of ``visual.merger`` in Qwen2-VL and Qwen2.5-VL.
    There the vision tower already orders patches by cells; here they come row-major and are ordered inside.

    Raises:
        ValueError: ``grid`` does not divide into r x r cells.
    """

    options_class = PatchMergerOptions
    options: PatchMergerOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: PatchMergerOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        width = self.options.merge_size**2 * vision_dim
        kind = RMSNorm if self.options.norm == "rms" else nn.LayerNorm
        self.ln_q = kind(vision_dim, eps=self.options.eps)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, llm_dim))

    def embed(self, cells: Cells, features: PatchFeatures) -> tuple[Tensor, Tensor]:
        """See :meth:`CellProjector.embed`."""
        joined = cells.gather(self.ln_q(features.patches)).flatten(2)  # (B, T, r² C)
        return self.mlp(joined), cells.means()
