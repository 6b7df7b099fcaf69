"""Attention and keys of one block of a vision transformer, from the hidden state that enters it.

The fused attention of the network does not give its weights away. One row of them is cheap to compute again, so the
network need not run its slow, "eager" form, and nothing in it is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lavis_svp.encoders.families import VisionFamily

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BlockAttention:
    """Queries and keys of a block.

    Args:
        queries: (B, H, T, d) of all tokens, prefix first, rotated where the model rotates.
        keys: (B, H, T, d), the same.
        plain_keys: (B, H, T, d) before the rotation.
        prefix: P, number of tokens before the patches; T = P + N.
    """

    queries: Tensor
    keys: Tensor
    plain_keys: Tensor
    prefix: int

    def to_patches(self, seen: Tensor, asking: Tensor) -> Tensor:
        """The attention that each patch gets, mean over heads.

        From CLS, the first token; without prefix tokens, the mean over the valid patches. Each head's weights are the
        softmax of q k^T / sqrt(d) over all tokens (arXiv 1706.03762, equation 1).

        Args:
            seen: (B, T) bool, the tokens that the model attends to.
            asking: (B, N) bool, the patches whose attention counts where there is no CLS.

        Returns:
            (B, N) float32.
        """
        heads = self.queries.shape[1]
        queries = self.queries[:, :, :1] if self.prefix else self.queries  # (B, H, Q, d)
        share = self.queries.new_ones(len(asking), 1) if self.prefix else asking.to(self.queries.dtype)  # (B, Q)
        share = (share / share.sum(1, keepdim=True).clamp_min(1)).float()
        total = torch.zeros(seen.shape, device=seen.device)  # (B, T)
        for head in range(heads):  # one at a time: without CLS there are N x N weights
            scores = queries[:, head] @ self.keys[:, head].mT * self.queries.shape[-1] ** -0.5  # (B, Q, T)
            weights = scores.float().masked_fill(~seen[:, None], float("-inf")).softmax(-1)
            total = total + torch.einsum("bq,bqt->bt", share, weights)
        return total[:, self.prefix :] / heads  # (B, N)

    def patch_keys(self) -> Tensor:
        """Keys of the patches, mean over heads: (B, N, d). Without the rotation, which says where, not what."""
        return self.plain_keys[:, :, self.prefix :].mean(1)  # (B, N, d)


def block_attention(
    network: PreTrainedModel, family: VisionFamily, states: Tensor, block: int, pixels: Tensor
) -> BlockAttention:
    """Queries and keys of a block.

    Args:
        network: a vision model of the family.
        family: says what its modules are called.
        states: (B, T, C), the hidden state that enters the block.
        block: index of the block, from 0.
        pixels: (B, 3, H, W) normalised images, for models that rotate.
    """
    names, heads = family.names, network.config.num_attention_heads
    module = network.get_submodule(names.blocks).get_submodule(str(block))
    normed = module.get_submodule(names.norm)(states)  # (B, T, C)
    queries, plain = (_heads(module.get_submodule(name), normed, heads) for name in (names.query, names.key))
    prefix, keys = family.prefix_tokens(network.config), plain
    if names.rotary is not None:
        rotation = network.get_submodule(names.rotary)(pixels)
        queries, keys = (_rotated(vectors, rotation, prefix) for vectors in (queries, plain))
    return BlockAttention(queries, keys, plain, prefix)


def _heads(projection: nn.Module, states: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, d)."""
    batch, count, _ = states.shape
    return projection(states).view(batch, count, heads, -1).transpose(1, 2)  # (B, H, T, d)


def _rotated(vectors: Tensor, rotation: Rotation, prefix: int) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of the patches; prefix tokens have no place.

    Args:
        vectors: (B, H, T, d).
        rotation: cos and sin, (N, d) each.
        prefix: tokens before the patches.
    """
    cos, sin = (part.to(vectors.dtype) for part in rotation)
    patches = vectors[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat([-second, first], dim=-1) * sin  # (B, H, N, d)
    return torch.cat([vectors[:, :, :prefix], turned], dim=2)  # (B, H, T, d)
