"""`perceiver`: learned latents read the patches by cross-attention (Flamingo's resampler, arXiv 2204.14198)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_svp.common.options import PositiveInt
from lavis_svp.projectors.base import Projector, ProjectorOptions, register_projector
from lavis_svp.projectors.layers import attend, pooling_weights, token_mlp
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class PerceiverOptions(ProjectorOptions):
    """Options of `perceiver`."""

    num_queries: PositiveInt = 40  # tokens, whatever the grid; Flamingo's own 64
    depth: PositiveInt = 6  # layers; Flamingo's, as the following
    heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    ffn_ratio: PositiveInt = 4  # width of the FFN over C


@register_projector("perceiver")
class PerceiverProjector(Projector):
    """A fixed number of tokens from learned latents, in the order of the latents.

    In each layer the latents attend to patches and latents together, then pass an FFN, both with residual. After a
    last LayerNorm, the head that all projectors share brings width C to D. The layers run at C and not at D to stay
    small compared with a large language model; a bare Linear at the end would give this rival less of a head than the
    others have.
    The layers do not know where a patch lies: position must be in the features, as it is in a vision transformer's.
    """

    options_class = PerceiverOptions
    options: PerceiverOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: PerceiverOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        opt = self.options
        self.latents = nn.Parameter(torch.randn(opt.num_queries, vision_dim))
        self.layers = nn.ModuleList(
            PerceiverLayer(vision_dim, opt.heads, opt.head_dim, opt.ffn_ratio) for _ in range(opt.depth)
        )
        self.norm = nn.LayerNorm(vision_dim)
        self.head = token_mlp(vision_dim, llm_dim)

    def num_tokens(self, grid: Grid) -> int:
        """Return the number of latents."""
        return self.options.num_queries

    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """See :meth:`Projector.project`; the assignment is the last layer's attention to the patches."""
        latents = self.latents.expand(len(features.grids), -1, -1)  # (B, T, C)
        attention = features.valid.float()[:, None]  # (B, 1, N)
        for layer in self.layers:
            latents, attention = layer(latents, features.patches, features.valid)  # (B, T, C), (B, T, N)
        tokens = self.head(self.norm(latents))  # (B, T, D)
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return VisualTokens(tokens, valid, lambda: pooling_weights(attention, features.valid))


class PerceiverLayer(nn.Module):
    """One layer of :class:`PerceiverProjector`; Linears have no bias, as in Flamingo."""

    def __init__(self, width: int, heads: int, head_dim: int, ffn_ratio: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.patch_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, ffn_ratio * width, bias=False),
            nn.GELU(),
            nn.Linear(ffn_ratio * width, width, bias=False),
        )

    def forward(self, latents: Tensor, patches: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Update the latents (B, T, C) by the valid ones of the patches (B, N, C).

        Returns:
            (B, T, C); and (B, T, N) float32, the share of its attention that each latent gives to each patch.
        """
        normed = self.latent_norm(latents)
        read = torch.cat([self.patch_norm(patches), normed], dim=1)  # (B, N + T, C)
        keys, values = self.key_value(read).chunk(2, dim=2)  # (B, N + T, inner) each
        allowed = torch.cat([valid, valid.new_ones(normed.shape[:2])], dim=1)  # (B, N + T)
        seen, attention = attend(self.query(normed), keys, values, allowed, self.heads)
        latents = latents + self.out(seen)
        return latents + self.ffn(latents), attention[..., : patches.shape[1]]
