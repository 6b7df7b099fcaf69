"""Read a SAM prompt out of the state that predicts ``[SEG]``: the paper's form, and optional aids for small models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROMPT_DIM = 256  # width of SAM's prompt tokens
STATE_NORMS = ("none", "batch")


@dataclass(frozen=True)
class SegPromptOptions:
    """How the state becomes a prompt. All defaults are the paper's host's (GLaMM's) form; the rest are departures.

    Args:
        state_norm: ``none``, or ``batch``: batch norm over ``[SEG]`` states. States of different expressions start
            almost parallel (cosine .998 measured), which batch norm undoes.
        pointer: score every visual token from the state (a listwise choice), and give the prompt MLP the state together
            with the chosen tokens' average.
        pointer_position: add SAM's positional encoding of the chosen tokens, and SAM's own point token, to the prompt.
        pointer_mask: give SAM the chosen tokens' area as its dense mask prompt.
        pointer_dim: width of the pointer's queries and keys.
    """

    state_norm: str = "none"
    pointer: bool = False
    pointer_position: bool = False
    pointer_mask: bool = False
    pointer_dim: int = 128

    def __post_init__(self) -> None:
        if self.state_norm not in STATE_NORMS:
            raise ValueError(f"model.readout.state_norm is '{self.state_norm}'; known: {', '.join(STATE_NORMS)}.")
        if (self.pointer_position or self.pointer_mask) and not self.pointer:
            raise ValueError("model.readout.pointer_position and pointer_mask need pointer: true.")


@dataclass
class SegPrompts:
    """Prompts for P masks.

    Args:
        sparse: (P, 1, 256) prompt token of each mask.
        area: (P, Hm, Wm) in [0, 1], the chosen tokens' area in the image's frame; None without ``pointer_mask``.
        scores: (P, T) log-probabilities of the visual tokens; None without a pointer.
    """

    sparse: Tensor
    area: Tensor | None
    scores: Tensor | None


class StateNorm(nn.BatchNorm1d):
    """Batch norm over ``[SEG]`` states; a single state in training is normed with the running statistics.

    Args:
        dim: D.
    """

    MOMENTUM = 0.05
    num_batches_tracked: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, momentum=self.MOMENTUM)

    def forward(self, states: Tensor) -> Tensor:
        """(P, D) -> (P, D) float32, whatever the parameters are kept in."""
        learns = self.training and len(states) > 1
        if learns:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            states.float(),
            self.running_mean,
            self.running_var,
            self.weight.float(),
            self.bias.float(),
            training=learns,
            momentum=self.MOMENTUM,
            eps=self.eps,
        )


class SegPromptHead(nn.Module):
    """State of ``[SEG]`` -> prompt of SAM's mask decoder.

    The paper's form is Linear(D, D), ReLU, Linear(D, 256), as LISA's and GLaMM's ``text_hidden_fcs``.

    Args:
        dim: D, the language model's width.
        token_scale: standard deviation of visual tokens, to bring them to unit size for the pointer.
        options: aids, all off by default.
    """

    def __init__(self, dim: int, token_scale: float, options: SegPromptOptions) -> None:
        super().__init__()
        self.options = options
        self.token_scale = token_scale
        self.norm: nn.Module = StateNorm(dim) if options.state_norm == "batch" else nn.Identity()
        last = nn.Linear(dim, PROMPT_DIM)
        self.mlp = nn.Sequential(nn.Linear(dim * (2 if options.pointer else 1), dim), nn.ReLU(), last)
        if options.pointer:
            self.query = nn.Linear(dim, options.pointer_dim)
            self.key = nn.Linear(dim, options.pointer_dim)
        if options.pointer_position:  # start from SAM's own point prompt
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        states: Tensor,
        image: Tensor,
        tokens: Tensor,
        valid: Tensor,
        positions: Tensor | None = None,
        areas: Tensor | None = None,
        point_token: Tensor | None = None,
    ) -> SegPrompts:
        """Make the prompts of P masks.

        Args:
            states: (P, D) states that predict ``[SEG]``.
            image: (P,) the image of each.
            tokens: (B, T, D) visual tokens.
            valid: (B, T) True for real tokens.
            positions: (B, T, 256) SAM's positional encoding of each token's place, for ``pointer_position``.
            areas: (B, T, Hm, Wm) each token's area, for ``pointer_mask``.
            point_token: (256,) SAM's embedding of "a foreground point", for ``pointer_position``.
        """
        states = self.norm(states)
        if not self.options.pointer:
            return SegPrompts(self.mlp(states)[:, None], None, None)
        seen = tokens.to(states.dtype)[image] / self.token_scale  # (P, T, D)
        scores = torch.einsum("pd,ptd->pt", self.query(states), self.key(seen))  # (P, T)
        scores = scores.float() / self.options.pointer_dim**0.5
        scores = scores.masked_fill(~valid[image], torch.finfo(torch.float32).min).log_softmax(-1)
        choice = scores.exp()
        attended = torch.einsum("pt,ptd->pd", choice, seen.float())  # (P, D)
        prompt = self.mlp(torch.cat([states.float(), attended], -1)).float()  # (P, 256)
        if self.options.pointer_position:
            if positions is None or point_token is None:
                raise ValueError("pointer_position needs the tokens' positions and SAM's point token.")
            prompt = prompt + torch.einsum("pt,ptc->pc", choice, positions.float()[image]) + point_token  # (P, 256)
        area = None
        if self.options.pointer_mask:
            if areas is None:
                raise ValueError("pointer_mask needs the tokens' areas.")
            area = torch.einsum("pt,pthw->phw", choice, areas.float()[image])  # (P, Hm, Wm)
        return SegPrompts(prompt[:, None], area, scores)
