"""Auxiliary losses that the paper does not have; each is a named option, off in the full-scale types.

They look at two places: the visual tokens (should point at the words that name their instance), and the pointer and
prompt of ``[SEG]`` (should choose the target's token, and start at the target's centre). docs/tiny.md says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_svp.common.options import check_weight, check_whole_number
from lavis_svp.common.tensors import no_autocast
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.projectors.layers import centroids
from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.mask_decoder import SegMaskDecoder
from lavis_svp.segmentation.region_mask import region_loss
from lavis_svp.segmentation.seg_prompt import SegPrompts
from lavis_svp.segmentation.targets import (
    AuxiliaryTargets,
    WordTargets,
    instance_of_region,
    object_shares,
)
from lavis_svp.vision.feature_extractor import VisionFeatures

PLACE_SCALE = 8.0  # a cosine of 1/4 then says "nearly at the edge"; the sides are symmetric, so there is no bias
MIN_SHARE = 0.5  # of a token's patches, that an object must cover for the token to show it
NO_INSTANCE_WEIGHT = 0.15  # of a token that shows no named instance, in word alignment; measured in the prototype


@dataclass(frozen=True)
class AuxiliaryLossOptions:
    """Weights of the auxiliary losses; 0 turns a loss off, and all are off by default.

    Args:
        grounding: the pointer should choose the token whose region fits the target best (needs seg_prompt.pointer);
            with ``seg_prompt.pointer_absent`` "no such thing" for an expression without a target.
        word_alignment: a visual token should point at the words that name its instance.
        place_alignment: a visual token should point at the words for its place (left, right, ...).
        alignment_steps: number of first optimizer steps that train the projector alone, by word and place alignment.
        point_regression: the prompt should be near SAM's embedding of the target's centre.
        regions: every token should know whether its region belongs to the target (needs seg_prompt.region_mask).
    """

    grounding: float = 0.0
    word_alignment: float = 0.0
    place_alignment: float = 0.0
    alignment_steps: int = 0
    point_regression: float = 0.0
    regions: float = 0.0

    def __post_init__(self) -> None:
        check_whole_number("model.auxiliary_losses.alignment_steps", self.alignment_steps, 0)
        for name in ("grounding", "word_alignment", "place_alignment", "point_regression", "regions"):
            check_weight(f"model.auxiliary_losses.{name}", getattr(self, name))
        if self.alignment_steps and not self.word_alignment:
            raise ValueError("model.auxiliary_losses.alignment_steps needs a word_alignment weight above 0.")

    @property
    def enabled(self) -> frozenset[str]:
        """Names of the losses that are on."""
        names = ("grounding", "word_alignment", "place_alignment", "point_regression", "regions")
        return frozenset(name for name in names if getattr(self, name))


class AuxiliaryLosses(nn.Module):
    """Word and place alignment of visual tokens; grounding of the pointer and regression of the prompt.

    Args:
        options: the weights.
    """

    def __init__(self, options: AuxiliaryLossOptions) -> None:
        super().__init__()
        self.options = options
        if options.word_alignment:
            self.scale = nn.Parameter(torch.tensor([8.0]))
            self.bias = nn.Parameter(torch.tensor([-2.0]))

    def weights(self) -> dict[str, float]:
        """Weight of each loss by its name in the output."""
        opt = self.options
        return {
            "loss_ground": opt.grounding,
            "loss_word": opt.word_alignment,
            "loss_place": opt.place_alignment,
            "loss_point": opt.point_regression,
            "loss_region": opt.regions,
        }

    def in_alignment_stage(self, step: float) -> bool:
        """Whether optimizer step ``step`` (from 0) trains the projector alone."""
        return self.training and step < self.options.alignment_steps

    def token_losses(
        self, vision: VisionFeatures, visual: VisualTokens, targets: AuxiliaryTargets, language: LanguageModel
    ) -> dict[str, Tensor]:
        """Word and place alignment of the visual tokens, in training.

        Args:
            vision: frozen features of B images.
            visual: their visual tokens.
            targets: what they should show, on their device.
            language: gives the embeddings of words.

        Returns:
            ``loss_word`` and ``loss_place``, each only where it is on; ``loss_word`` only where the batch names at
            least two words.
        """
        losses: dict[str, Tensor] = {}
        if not self.training:
            return losses
        if self.options.word_alignment and targets.words is not None:
            losses["loss_word"] = self._word_loss(visual, targets.words, language)
        if self.options.place_alignment and targets.place_ids is not None:
            losses["loss_place"] = _place_loss(vision, visual, word_embeddings(language, targets.place_ids))
        return losses

    def prompt_losses(
        self,
        visual: VisualTokens,
        prompts: SegPrompts,
        image_index: Tensor,
        targets: AuxiliaryTargets,
        mask_decoder: SegMaskDecoder,
        without_target: SegPrompts | None = None,
    ) -> dict[str, Tensor]:
        """Grounding of the pointer and regression of the prompt, of P expressions with a target.

        Args:
            visual: visual tokens of B images.
            prompts: P prompts of the mask decoder.
            image_index: (P,) the image of each prompt.
            targets: where each prompt should point, on the prompts' device.
            mask_decoder: gives SAM's encoding of a point.
            without_target: prompts of expressions without a target, for ``pointer_absent``.

        Returns:
            ``loss_ground`` and ``loss_point``, each only where it is on; without a target at most the former, of
            ``without_target``.
        """
        losses: dict[str, Tensor] = {}
        absent = None if without_target is None else without_target.absent
        if self.options.grounding and prompts.scores is not None and (_has_regions(targets) or absent is not None):
            target_choice = torch.zeros_like(prompts.scores)  # (P, T), of a batch without any target
            if _has_regions(targets):
                target_choice = listwise_target(token_ious(visual, targets, image_index))
            losses["loss_ground"] = grounding_loss(prompts.scores, target_choice, absent)
        if self.options.regions and prompts.regions is not None and targets.inside is not None:
            assert targets.areas is not None and visual.order is not None
            order = visual.order[image_index]  # (P, T)
            inside, areas = (_of_superpixels(one, order, 0.0) for one in (targets.inside, targets.areas))  # (P, T)
            losses["loss_region"] = region_loss(prompts.regions, inside, areas)
        if self.options.point_regression and targets.centres is not None:
            position = mask_decoder.position_of(targets.centres[:, 0], targets.centres[:, 1])  # (P, 256)
            expected = position + mask_decoder.point_token.float()  # (P, 256)
            losses["loss_point"] = (prompts.sparse[:, 0].float() - expected).square().mean()
        return losses

    def _word_loss(self, visual: VisualTokens, targets: WordTargets, language: LanguageModel) -> Tensor:
        """Word alignment over the batch, whose words are each other's negatives."""
        owner = token_owners(visual, targets)  # (B, T)
        counts = placed_tokens(visual) & targets.annotated[:, None]  # (B, T)
        weight = torch.where(owner >= 0, 1.0, NO_INSTANCE_WEIGHT) * counts  # (B, T)
        return word_alignment_loss(
            visual.tokens.flatten(0, 1),  # (B * T, D)
            word_embeddings(language, targets.ids),
            targets.named[owner].flatten(0, 1),  # (B * T, V)
            weight.flatten(),
            self.scale,
            self.bias,
        )


def _place_loss(vision: VisionFeatures, visual: VisualTokens, words: Tensor) -> Tensor:
    """Agreement of tokens with the words for their place: a token at x is right to x, and left to 1 - x."""
    y, x = token_places(vision, visual).flatten(0, 1).unbind(1)  # (B * T,) each
    labels = torch.stack([1 - x, x, 1 - y, y, 1 - y, y], dim=1)  # (B * T, words)
    scale = torch.full_like(x[:1], PLACE_SCALE)
    weight = placed_tokens(visual).flatten().float()  # (B * T,)
    return word_alignment_loss(visual.tokens.flatten(0, 1), words, labels, weight, scale, torch.zeros_like(scale))


def _has_regions(targets: AuxiliaryTargets) -> bool:
    return targets.iou is not None or targets.shares is not None


# ---------------------------------------------------------------- the losses themselves


def grounding_loss(scores: Tensor, target: Tensor, absent: Tensor | None = None) -> Tensor:
    """Cross-entropy between pointer and target distributions, mean over expressions.

    Args:
        scores: (P, T) log-probabilities.
        target: (P, T) rows sum to 1, or to 0 for an expression that no token overlaps (it does not count).
        absent: (A,) log-probabilities of "no such thing" for further expressions, which have no target.
    """
    found = (target.sum(-1) > 0).float()
    per_row = -(target * scores.clamp_min(-1e4)).sum(-1)  # (P,)
    total, count = (per_row * found).sum(), found.sum()
    if absent is not None:
        total, count = total - absent.clamp_min(-1e4).sum(), count + len(absent)
    return total / count.clamp_min(1)


def word_alignment_loss(
    tokens: Tensor, words: Tensor, labels: Tensor, weight: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Multi-label agreement of visual tokens with words: each token should point at the words that name its instance.

    Args:
        tokens: (M, D) visual tokens.
        words: (V, D) mean input embedding of each word.
        labels: (M, V) 1 where the word names the token's instance.
        weight: (M,) weight of each token.
        scale: scalar that multiplies the cosine.
        bias: scalar that is added to it.
    """
    centred = words.float() - words.float().mean(0, keepdim=True)
    with no_autocast(tokens.device):
        cosine = F.normalize(tokens.float(), dim=-1) @ F.normalize(centred, dim=-1).T  # (M, V)
    logits = scale.float() * cosine + bias.float()
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    return (loss * weight).sum() / weight.sum().clamp_min(1e-6)


def listwise_target(iou: Tensor, sharpness: float = 2.0) -> Tensor:
    """Turn IoUs into a distribution over tokens: proportional to IoU ** ``sharpness``.

    Args:
        iou: (..., T) non-negative.
        sharpness: 1 spreads over all overlapping tokens, a larger value favours the best.

    Returns:
        (..., T) sums to 1; all zero where nothing overlaps.
    """
    weight = iou.float() ** sharpness
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)


def word_embeddings(language: LanguageModel, ids: Tensor) -> Tensor:
    """Mean input embedding of each word's tokens, without a gradient: tokens move towards words, not words to tokens.

    Args:
        language: holds the embeddings.
        ids: (V, L) int64, see :func:`~lavis_svp.segmentation.targets.word_token_ids`.

    Returns:
        (V, D) float32.
    """
    real = ids >= 0  # (V, L)
    embedded = language.embed(ids).detach().float().masked_fill(~real[..., None], 0.0)  # (V, L, D)
    return embedded.sum(1) / real.sum(1, keepdim=True)  # (V, D)


# ---------------------------------------------------------------- what a token covers


def placed_tokens(visual: VisualTokens) -> Tensor:
    """(B, T) bool, the real tokens except that of an image without superpixels, which shows all of it."""
    return visual.valid if visual.order is None else visual.valid & (visual.order >= 0)


def token_ious(visual: VisualTokens, targets: AuxiliaryTargets, image_index: Tensor) -> Tensor:
    """IoU of the area of each visual token with the target of each of P expressions.

    Args:
        visual: visual tokens of B images.
        targets: with ``iou`` or ``shares``.
        image_index: (P,) the image of each expression.

    Returns:
        (P, T) float32; 0 for padding, and for the token of an image without superpixels.

    Raises:
        ValueError: the targets are those of another kind of tokens.
    """
    if targets.iou is not None and visual.order is not None:
        return _of_superpixels(targets.iou, visual.order[image_index], 0.0)  # (P, T)
    if targets.shares is None:
        raise ValueError("The targets hold no patches' shares, but the projector makes its tokens from patches.")
    return grid_iou(_assignment(visual, targets.shares.shape[-1])[image_index], targets.shares)  # (P, T)


def token_owners(visual: VisualTokens, targets: WordTargets) -> Tensor:
    """The annotated object that each visual token shows.

    Args:
        visual: visual tokens of B images.
        targets: of the same images.

    Returns:
        (B, T) int64, counted through the batch; -1 for none, in padding too.

    Raises:
        ValueError: the targets are those of another kind of tokens.
    """
    if targets.owner is not None and visual.order is not None:
        return _of_superpixels(targets.owner, visual.order, -1)  # (B, T)
    if targets.shares is None or targets.first is None:
        raise ValueError("The targets hold no patches' shares, but the projector makes its tokens from patches.")
    with no_autocast(visual.tokens.device):
        weight = _assignment(visual, targets.shares.shape[-1]) @ targets.shares.transpose(1, 2)  # (B, T, objects)
    best, owner = weight.max(-1)  # (B, T) each
    return torch.where(best > MIN_SHARE, owner + targets.first[:, None], -1)


def _of_superpixels(values: Tensor, order: Tensor, other: float) -> Tensor:
    """The values (X, S) of superpixels for tokens made of them in the order (X, T), ``other`` for those of none."""
    return torch.where(order >= 0, values.gather(1, order.clamp_min(0)), other)  # (X, T)


def token_instances(vision: VisionFeatures, visual: VisualTokens, index: int, labels: np.ndarray) -> np.ndarray:
    """The annotated object that each visual token of one image shows, on the host; for probes.

    Args:
        vision: frozen features of B images.
        visual: their visual tokens.
        index: the image.
        labels: (H, W) int32 object of each pixel, -1 = none.

    Returns:
        (T_b,) index of the object, -1 for none.
    """
    host = visual.on_host
    if vision.region_maps is not None and host.order is not None:
        order = np.array(host.order[index], np.int64)
        return np.where(order >= 0, instance_of_region(vision.region_maps[index], labels)[order], -1)
    shares = object_shares(labels, vision.patches.grids[index])  # (objects, N)
    weight = _assignment(visual, shares.shape[-1])[index, : host.counts[index]].cpu() @ shares.T  # (T_b, objects)
    best, owner = weight.max(1)
    return torch.where(best > MIN_SHARE, owner, -1).numpy()


def token_places(vision: VisionFeatures, visual: VisualTokens) -> Tensor:
    """Where each token's centroid lies in its image: (B, T, 2) y and x, from 0 to 1.

    Raises:
        ValueError: the projector does not report which patches its tokens come from.
    """
    if visual.assignment is None:
        raise ValueError("This projector does not report which patches its tokens come from; turn place_alignment off.")
    patches = centroids(visual.assignment.detach(), *vision.patches.coordinates())  # (B, T, 2)
    return (patches / vision.on_grids.spans[:, None]).clamp(0.0, 1.0).float()  # (B, T, 2)


def grid_iou(assignment: Tensor, mask_share: Tensor) -> Tensor:
    """IoU of every token with a mask when tokens are made of whole patches.

    Args:
        assignment: (..., T, N) row-stochastic patch weights of each token.
        mask_share: (..., N) share of each patch that the mask covers.

    Returns:
        (..., T) soft IoU, counting a token's patches by their weight relative to its largest.
    """
    member = assignment / assignment.amax(-1, keepdim=True).clamp_min(1e-6)  # (..., T, N)
    with no_autocast(member.device):
        shared = (member @ mask_share[..., None])[..., 0]  # (..., T)
    return shared / (member.sum(-1) + mask_share.sum(-1, keepdim=True) - shared).clamp_min(1e-6)


def _assignment(visual: VisualTokens, patches: int) -> Tensor:
    """(B, T, N) float32 patches that each token stands for, of the first N; the rest is padding."""
    if visual.assignment is None:
        raise ValueError(
            "This projector does not report which patches its tokens come from; turn the auxiliary losses off."
        )
    return visual.assignment.detach().float()[..., :patches]  # (B, T, N)
