"""From the state that predicts ``[SEG]`` to a prompt of SAM's decoder: the paper's form, and options beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_svp.common.tensors import no_autocast
from lavis_svp.language.splice import NounStates
from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.mask_decoder import SegMaskDecoder
from lavis_svp.vision.feature_extractor import VisionFeatures

FARTHEST = 20.0  # behind the pointer's best token; padding is as far
PROMPT_DIM = 256  # width of SAM's prompt tokens
StateNormName = Literal["none", "batch"]


@dataclass(frozen=True)
class SegPromptOptions:
    """How the state becomes a prompt.

    All defaults are the form of the model that the paper builds on (GLaMM); the rest are options that differ from the
    paper.

    Args:
        state_norm: ``none``, or ``batch``: batch norm over ``[SEG]`` states. States of different expressions start
            almost parallel (a cosine of .998 was measured), which batch norm undoes.
        pointer: score every visual token from the state (a softmax over the tokens), and give the prompt MLP the
            state together with the mean of the tokens, weighted by their scores.
        pointer_position: add SAM's positional encoding of the chosen tokens and SAM's own point token to the prompt, so
            that the prompt has the form of SAM's own point prompt.
        pointer_dim: width of the pointer's queries and keys.
        pointer_nouns: compare the expression's nouns with what an image classifier sees in each token's region
            (``model.classifier``), and add that to the pointer's scores; see :class:`NounEvidence`.
        pointer_absent: one more choice of the pointer, "no such thing", which it learns from expressions without a
            target (``auxiliary_losses.grounding``); ``prompt.answers`` must begin with ``[SEG]``.
        region_mask: say of every token whether its region belongs to the target, and add that to the decoder's mask
            (``segmentation/region_mask.py``); learned by the mask losses and ``auxiliary_losses.regions``.
    """

    REMOVED_KEYS: ClassVar = {"pointer_mask": False}
    state_norm: StateNormName = "none"
    pointer: bool = False
    pointer_position: bool = False
    pointer_dim: int = 128
    pointer_nouns: bool = False
    pointer_absent: bool = False
    region_mask: bool = False

    def __post_init__(self) -> None:
        if self.state_norm not in get_args(StateNormName):
            raise ValueError(
                f"model.seg_prompt.state_norm is '{self.state_norm}'; known: {', '.join(get_args(StateNormName))}."
            )
        if self.pointer_position and not self.pointer:
            raise ValueError("model.seg_prompt.pointer_position needs pointer: true.")
        for key in ("pointer_nouns", "pointer_absent", "region_mask"):
            if getattr(self, key) and not self.pointer:
                raise ValueError(f"model.seg_prompt.{key} needs pointer: true.")


@dataclass
class SegPrompts:
    """Prompts for P masks.

    Args:
        sparse: (P, 1, 256) prompt token of each mask.
        scores: (P, T) log-probabilities of the visual tokens; None without a pointer. With ``pointer_absent`` they do
            not sum to 1.
        absent: (P,) log-probability that there is no such thing; None without ``pointer_absent``.
        regions: (P, T) logits that a token's region belongs to the target; None without ``region_mask``.
    """

    sparse: Tensor
    scores: Tensor | None
    absent: Tensor | None = None
    regions: Tensor | None = None

    def at(self, index: Tensor) -> SegPrompts:
        """Those at (K,) places."""
        return self._changed(lambda tensor: tensor.index_select(0, index))

    def split(self, count: int) -> tuple[SegPrompts, SegPrompts]:
        """The first ``count`` prompts, and the others."""
        return self._changed(lambda tensor: tensor[:count]), self._changed(lambda tensor: tensor[count:])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> SegPrompts:
        optional = (self.scores, self.absent, self.regions)
        return SegPrompts(change(self.sparse), *(None if part is None else change(part) for part in optional))


class StateNorm(nn.BatchNorm1d):
    """Batch norm over ``[SEG]`` states; a single state in training is normed with the running statistics.

    Args:
        dim: D.
    """

    MOMENTUM = 0.05
    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, momentum=self.MOMENTUM)

    def forward(self, states: Tensor) -> Tensor:
        """(P, D) -> (P, D) float32, in whatever precision parameters and running statistics are kept."""
        use_batch_statistics = self.training and len(states) > 1
        if use_batch_statistics:
            self.num_batches_tracked.add_(1)
        mean, variance = self.running_mean.float(), self.running_var.float()  # themselves, if they are float32
        with no_autocast(states.device):
            normed = F.batch_norm(
                states.float(),
                mean,
                variance,
                self.weight.float(),
                self.bias.float(),
                training=use_batch_statistics,
                momentum=self.MOMENTUM,
                eps=self.eps,
            )
        if use_batch_statistics and self.running_mean.dtype != torch.float32:
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)
        return normed


class NounEvidence(nn.Module):
    """How well an expression's nouns fit what a classifier sees in each token's region.

    A noun's fit is the log of the summed probability of the classes that it names: without any training, the region
    where it is largest lies in the named thing three times as often as chance (benchmarks/reports/photographs.md).
    Which of the nouns is meant ("the cup left of the laptop") is for the language model to say: the state that predicts
    ``[SEG]`` attends to the states at the nouns, or to none of them.

    Args:
        dim: D, the language model's width.
        attention_dim: width of queries and keys.
        nouns: (V, K) bool, whether a noun of the table names a class of the classifier.
    """

    FLOOR = 1e-4
    """Added to probabilities: below it, a classifier's opinion is noise."""
    nouns: Tensor

    def __init__(self, dim: int, attention_dim: int, nouns: Tensor) -> None:
        super().__init__()
        self.register_buffer("nouns", nouns, persistent=False)
        self.query = nn.Linear(dim, attention_dim)
        self.key = nn.Linear(dim, attention_dim)
        self.norm = nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor, image_index: Tensor, nouns: NounStates, classes: Tensor) -> Tensor:
        """Score the tokens for P expressions.

        Args:
            states: (P, D) normed states that predict ``[SEG]``.
            image_index: (P,) the image of each.
            nouns: the states at the expressions' nouns, J at most.
            classes: (B, T, K) log-probabilities of the classes in the tokens' regions.

        Returns:
            (P, T) float32, 0 for an expression without known nouns.
        """
        query, key = _through(self.query, states), _through(self.key, _through(self.norm, nouns.states))
        known = nouns.ids >= 0  # (P, J)
        with no_autocast(states.device):
            attention = torch.einsum("pd,pjd->pj", query.float(), key.float()) / key.shape[-1] ** 0.5  # (P, J)
            attention = attention.masked_fill(~known, torch.finfo(torch.float32).min)
            with_none = torch.cat([attention, torch.zeros_like(attention[:, :1])], 1)  # (P, J + 1)
            share = with_none.softmax(1)[:, :-1]  # (P, J)
            named = self.nouns[nouns.ids.clamp_min(0)].float() * known[..., None]  # (P, J, K)
            probability = classes.float().exp()[image_index]  # (P, T, K)
            fit = (torch.einsum("ptk,pjk->pjt", probability, named) + self.FLOOR).log()  # (P, J, T)
            return self.scale.float() * torch.einsum("pj,pjt->pt", share, fit)  # (P, T)


class SegPromptHead(nn.Module):
    """State of ``[SEG]`` -> prompt of SAM's mask decoder.

    The paper's form is Linear(D, D), ReLU, Linear(D, 256), which LISA and GLaMM call ``text_hidden_fcs``.

    Args:
        dim: D, the language model's width.
        token_std: standard deviation of the visual tokens, which the pointer divides by.
        options: those that differ from the paper's form, all off by default.
        nouns: for ``pointer_nouns``, see :class:`NounEvidence`.
    """

    def __init__(self, dim: int, token_std: float, options: SegPromptOptions, nouns: Tensor | None = None) -> None:
        super().__init__()
        self.options = options
        self.token_std = token_std
        self.norm: nn.Module = StateNorm(dim) if options.state_norm == "batch" else nn.Identity()
        last = nn.Linear(dim, PROMPT_DIM)
        self.mlp = nn.Sequential(nn.Linear(dim * (2 if options.pointer else 1), dim), nn.ReLU(), last)
        if options.pointer:
            self.query = nn.Linear(dim, options.pointer_dim)
            self.key = nn.Linear(dim, options.pointer_dim)
        if options.pointer_nouns:
            assert nouns is not None
            self.noun_evidence = NounEvidence(dim, options.pointer_dim, nouns)
        if options.region_mask:
            self.region_query = nn.Linear(dim, options.pointer_dim)
            self.region_key = nn.Linear(dim, options.pointer_dim)
            self.region_scale = nn.Parameter(torch.tensor([1.0, 1.0]))  # of the pointer's lead, and what is added
        if options.pointer_absent:
            self.absent = nn.Linear(dim, 1)
        if options.pointer_position:  # at the start the prompt is exactly a point prompt of SAM
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        states: Tensor,
        image_index: Tensor,
        visual: VisualTokens,
        positions: Tensor | None = None,
        point_token: Tensor | None = None,
        nouns: NounStates | None = None,
    ) -> SegPrompts:
        """Make the prompts of P masks.

        Args:
            states: (P, D) states that predict ``[SEG]``.
            image_index: (P,) the image of each state.
            visual: visual tokens of B images; only the pointer looks at them.
            positions: (B, T, 256) SAM's encoding of each token's place (:func:`token_positions`), for
                ``pointer_position``.
            point_token: (256,) SAM's embedding of "a foreground point", for ``pointer_position``.
            nouns: the states at the expressions' nouns, for ``pointer_nouns``.

        Raises:
            ValueError: ``pointer_position`` lacks the positions or the point token, or ``pointer_nouns`` its inputs.
        """
        states = self.norm(states)
        if not self.options.pointer:
            return SegPrompts(_through(self.mlp, states)[:, None], None)
        tokens = visual.tokens.float() / self.token_std  # (B, T, D)
        query, key = _through(self.query, states), _through(self.key, tokens)  # (P, d), (B, T, d)
        with no_autocast(states.device):  # a softmax over scores in 16 bits would choose another place
            scores = torch.einsum("pd,ptd->pt", query.float(), key.float()[image_index])  # (P, T)
            scores = scores / self.options.pointer_dim**0.5
            if self.options.pointer_nouns:
                if nouns is None or visual.classes is None:
                    raise ValueError("pointer_nouns needs the nouns' states and the classes of the tokens' regions.")
                scores = scores + self.noun_evidence(states, image_index, nouns, visual.classes)  # (P, T)
            valid = visual.valid[image_index]  # (P, T)
            scores = scores.masked_fill(~valid, torch.finfo(torch.float32).min)
            chances = scores.log_softmax(-1)  # (P, T), of the tokens alone
            weights, absent, regions = chances.exp(), None, None
            if self.options.region_mask:
                ask, answer = _through(self.region_query, states), _through(self.region_key, tokens)
                regions = torch.einsum("pd,ptd->pt", ask.float(), answer.float()[image_index])  # (P, T)
                behind = (scores - scores.amax(1, keepdim=True)).clamp_min(-FARTHEST)  # (P, T), 0 for the best
                scale = self.region_scale.float()
                regions = regions / self.options.pointer_dim**0.5 + scale[0] * behind + scale[1]
            if self.options.pointer_absent:
                level = _through(self.absent, states).float()  # (P, 1)
                choices = torch.cat([scores, level], 1).log_softmax(-1)  # (P, T + 1)
                chances, absent = choices[:, :-1], choices[:, -1]  # (P, T), (P,)
            attended = torch.einsum("pt,ptd->pd", weights, tokens[image_index])  # (P, D)
        prompt = _through(self.mlp, torch.cat([states.float(), attended], -1)).float()  # (P, 256)
        if self.options.pointer_position:
            if positions is None or point_token is None:
                raise ValueError("pointer_position needs the tokens' positions and SAM's point token.")
            with no_autocast(states.device):
                place = torch.einsum("pt,ptc->pc", weights, positions.float()[image_index])  # (P, 256)
            prompt = prompt + place + point_token.float()  # (P, 256)
        return SegPrompts(prompt[:, None], chances, absent, regions)


def _through(layer: nn.Module, states: Tensor) -> Tensor:
    """Run a layer on states in its own weights' type, whatever type the states have come in."""
    return layer(states.to(next(layer.parameters()).dtype))


def token_positions(visual: VisualTokens, vision: VisionFeatures, mask_decoder: SegMaskDecoder) -> Tensor:
    """SAM's positional encoding of each visual token's place: the mean over its patches' centres.

    Args:
        visual: tokens with their ``assignment`` to patches.
        vision: the images' patch grids and their places in SAM's input.
        mask_decoder: gives SAM's encoding.

    Returns:
        (B, T, 256).

    Raises:
        ValueError: the projector does not report which patches its tokens come from.
    """
    if visual.assignment is None:
        raise ValueError(
            "This projector does not report which patches its tokens come from; set seg_prompt.pointer_position: False."
        )
    row, column = vision.patches.coordinates()  # (B, N) each
    step = vision.on_grids.steps  # (B, 2), one patch in SAM's input, as a share of its side
    y = (row.to(step.device) + 0.5) * step[:, :1]  # (B, N)
    x = (column.to(step.device) + 0.5) * step[:, 1:]  # (B, N)
    encoded = mask_decoder.position_of(x, y)  # (B, N, 256)
    with no_autocast(step.device):
        return torch.einsum("btn,bnc->btc", visual.assignment.float(), encoded)  # (B, T, 256)
