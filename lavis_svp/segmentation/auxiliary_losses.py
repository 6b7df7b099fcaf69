"""Auxiliary losses that the paper does not have; each is a named option, off in the full-scale types.

They look at two places: the visual tokens (should point at the words that name their instance), and the pointer and
prompt of ``[SEG]`` (should choose the target's token, and start at the target's centre). docs/tiny.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_svp.common.images import nearest
from lavis_svp.common.options import check_weight, check_whole_number
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.projectors.layers import centroids
from lavis_svp.projectors.types import VisualTokens
from lavis_svp.segmentation.mask_decoder import SegMaskDecoder
from lavis_svp.segmentation.seg_prompt import SegPrompts
from lavis_svp.superpixels.region_map import RegionMap, region_ious
from lavis_svp.vision.feature_extractor import VisionFeatures
from lavis_svp.vision.geometry import mask_centre

PLACE_WORDS = ("left", "right", "above", "below", "top", "bottom")
PLACE_SCALE = 8.0  # a cosine of 1/4 then says "nearly at the edge"; the sides are symmetric, so there is no bias
NO_INSTANCE_WEIGHT = 0.15  # of a token that shows no named instance, in word alignment; measured in the prototype


@dataclass(frozen=True)
class AuxiliaryLossOptions:
    """Weights of the auxiliary losses; 0 turns a loss off, and all are off by default.

    Args:
        grounding: the pointer should choose the token whose region fits the target best (needs seg_prompt.pointer).
        word_alignment: a visual token should point at the words that name its instance.
        place_alignment: a visual token should point at the words for its place (left, right, ...).
        alignment_steps: number of first optimizer steps that train the projector alone, by word and place alignment.
        point_regression: the prompt should be near SAM's embedding of the target's centre.
    """

    grounding: float = 0.0
    word_alignment: float = 0.0
    place_alignment: float = 0.0
    alignment_steps: int = 0
    point_regression: float = 0.0

    def __post_init__(self) -> None:
        check_whole_number("model.auxiliary_losses.alignment_steps", self.alignment_steps, 0)
        for name in ("grounding", "word_alignment", "place_alignment", "point_regression"):
            check_weight(f"model.auxiliary_losses.{name}", getattr(self, name))
        if self.alignment_steps and not self.word_alignment:
            raise ValueError("model.auxiliary_losses.alignment_steps needs a word_alignment weight above 0.")


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
        }

    def in_alignment_stage(self, step: float) -> bool:
        """Whether optimizer step ``step`` (from 0) trains the projector alone."""
        return self.training and step < self.options.alignment_steps

    def token_losses(
        self,
        vision: VisionFeatures,
        visual: VisualTokens,
        instances: Sequence[Mapping[str, Any] | None] | None,
        language: LanguageModel,
    ) -> dict[str, Tensor]:
        """Word and place alignment of the visual tokens, in training.

        Args:
            vision: frozen features of B images.
            visual: their visual tokens.
            instances: for each image its annotated objects: ``labels`` (H, W) int32, the object of each pixel or -1,
                and ``words``, the words of each object; None where an image has no annotation.
            language: gives the embeddings of words.

        Returns:
            ``loss_word`` and ``loss_place``, each only where it is on; ``loss_word`` only where the batch names at
            least two words.
        """
        losses: dict[str, Tensor] = {}
        if not self.training:
            return losses
        word = self._word_loss(vision, visual, instances, language) if self.options.word_alignment else None
        if word is not None:
            losses["loss_word"] = word
        if self.options.place_alignment:
            losses["loss_place"] = self._place_loss(vision, visual, language)
        return losses

    def prompt_losses(
        self,
        vision: VisionFeatures,
        visual: VisualTokens,
        prompts: SegPrompts,
        image_index: Tensor,
        targets: Sequence[np.ndarray],
        mask_decoder: SegMaskDecoder,
    ) -> dict[str, Tensor]:
        """Grounding of the pointer and regression of the prompt, of P expressions with a target.

        Args:
            vision: frozen features of B images.
            visual: their visual tokens.
            prompts: P prompts of the mask decoder.
            image_index: (P,) the image of each prompt.
            targets: P masks (H, W) 0/1.
            mask_decoder: gives SAM's encoding of a point.

        Returns:
            ``loss_ground`` and ``loss_point``, each only where it is on; nothing without a target.
        """
        losses: dict[str, Tensor] = {}
        if not targets:
            return losses
        images = image_index.tolist() if self.options.grounding or self.options.point_regression else []
        if self.options.grounding and prompts.scores is not None:
            rows = [
                listwise_target(token_iou(vision, visual, index, target))
                for index, target in zip(images, targets, strict=True)
            ]
            target_choice = torch.stack(rows).to(prompts.scores.device)  # (P, T)
            losses["loss_ground"] = grounding_loss(prompts.scores, target_choice)
        if self.options.point_regression:
            centres = torch.stack(
                [mask_centre(t, vision.geometry[index]) for t, index in zip(targets, images, strict=True)]
            ).to(prompts.sparse.device)  # (P, 2)
            expected = mask_decoder.position_of(centres[:, 0], centres[:, 1]) + mask_decoder.point_token  # (P, 256)
            losses["loss_point"] = (prompts.sparse[:, 0].float() - expected.float()).square().mean()
        return losses

    def _word_loss(
        self,
        vision: VisionFeatures,
        visual: VisualTokens,
        instances: Sequence[Mapping[str, Any] | None] | None,
        language: LanguageModel,
    ) -> Tensor | None:
        """Word alignment over the batch, whose words are each other's negatives; None for fewer than two words."""
        if instances is None:
            return None
        device = visual.tokens.device
        vocabulary = sorted({w for item in instances if item is not None for words in item["words"] for w in words})
        if len(vocabulary) < 2:
            return None
        column = {word: index for index, word in enumerate(vocabulary)}
        tokens, labels, weights = [], [], []
        for index, item in enumerate(instances):
            if item is None:
                continue
            owner = token_instances(vision, visual, index, item["labels"])  # (T_b,)
            table = torch.zeros(len(owner), len(vocabulary))
            for row, instance in enumerate(owner.tolist()):
                if instance >= 0:
                    table[row, [column[word] for word in item["words"][instance]]] = 1
            tokens.append(visual.tokens[index, : len(owner)])
            labels.append(table)
            weight = torch.where(torch.from_numpy(owner) >= 0, 1.0, NO_INSTANCE_WEIGHT)
            if visual.order is not None:  # the token of an image without superpixels shows all of it
                weight[(visual.order[index, : len(owner)] < 0).cpu()] = 0.0
            weights.append(weight)
        words = word_embeddings(language, vocabulary, device)  # (V, D)
        return word_alignment_loss(
            torch.cat(tokens), words, torch.cat(labels).to(device), torch.cat(weights).to(device), self.scale, self.bias
        )

    def _place_loss(self, vision: VisionFeatures, visual: VisualTokens, language: LanguageModel) -> Tensor:
        """Agreement of tokens with the words for their place: a token at x is right to x, and left to 1 - x."""
        placed = visual.valid if visual.order is None else visual.valid & (visual.order >= 0)  # (B, T)
        y, x = token_places(vision, visual)[placed].unbind(1)  # (M,) each
        labels = torch.stack([1 - x, x, 1 - y, y, 1 - y, y], dim=1)  # (M, words)
        words = word_embeddings(language, list(PLACE_WORDS), x.device)  # (words, D)
        scale = torch.full_like(x[:1], PLACE_SCALE)
        tokens = visual.tokens[placed]  # (M, D)
        return word_alignment_loss(tokens, words, labels, torch.ones_like(x), scale, torch.zeros_like(scale))


# ---------------------------------------------------------------- the losses themselves


def grounding_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy between pointer and target distributions, mean over expressions.

    Args:
        scores: (P, T) log-probabilities.
        target: (P, T) rows sum to 1, or to 0 for an expression that no token overlaps (it does not count).
    """
    found = (target.sum(-1) > 0).float()
    per_row = -(target * scores.clamp_min(-1e4)).sum(-1)  # (P,)
    return (per_row * found).sum() / found.sum().clamp_min(1)


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
    centred = words - words.mean(0, keepdim=True)
    cosine = F.normalize(tokens.float(), dim=-1) @ F.normalize(centred.float(), dim=-1).T  # (M, V)
    loss = F.binary_cross_entropy_with_logits(scale * cosine + bias, labels, reduction="none").mean(-1)
    return (loss * weight).sum() / weight.sum().clamp_min(1e-6)


def listwise_target(iou: Tensor, sharpness: float = 2.0) -> Tensor:
    """Turn IoUs into a distribution over tokens: proportional to IoU ** ``sharpness``.

    Args:
        iou: (T,) non-negative.
        sharpness: 1 spreads over all overlapping tokens, a larger value favours the best.

    Returns:
        (T,) sums to 1; all zero where nothing overlaps.
    """
    weight = iou.float() ** sharpness
    return weight / weight.sum().clamp_min(1e-6)


def word_embeddings(language: LanguageModel, vocabulary: list[str], device: torch.device) -> Tensor:
    """(V, D) mean input embedding of each word's tokens, as the word stands inside a sentence.

    It has no gradient: tokens move towards words, not words towards tokens.
    """
    ids = [language.tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in vocabulary]
    flat = torch.tensor([one for word in ids for one in word], device=device)
    embedded = language.embed(flat).detach()  # (tokens, D)
    return torch.stack([word.mean(0) for word in embedded.split([len(word) for word in ids])])  # (V, D)


# ---------------------------------------------------------------- what a token covers


def token_iou(vision: VisionFeatures, visual: VisualTokens, index: int, target: np.ndarray) -> Tensor:
    """IoU of the area of each visual token of an image with a mask.

    Args:
        vision: frozen features of B images.
        visual: their visual tokens.
        index: the image.
        target: (H, W) 0/1 over the image.

    Returns:
        (T,); 0 for padding.
    """
    result = torch.zeros(visual.valid.shape[1])
    count = int(visual.valid[index].sum())
    if vision.region_maps is not None and visual.order is not None:
        order = visual.order[index, :count].cpu()
        shown = order >= 0  # the token of an image without superpixels shows no region
        by_region = torch.from_numpy(region_iou(vision.region_maps[index], target))  # (S,)
        result[:count][shown] = by_region[order[shown]]
        return result
    share = F.adaptive_avg_pool2d(torch.as_tensor(target)[None].float(), vision.patches.grids[index]).flatten()  # (N,)
    result[:count] = grid_iou(_assignment(visual, index, count), share)
    return result


def token_instances(vision: VisionFeatures, visual: VisualTokens, index: int, labels: np.ndarray) -> np.ndarray:
    """The annotated object that each visual token of an image shows.

    Args:
        vision: frozen features of B images.
        visual: their visual tokens.
        index: the image.
        labels: (H, W) int32 object of each pixel, -1 = none.

    Returns:
        (T_b,) index of the object, -1 for none.
    """
    count = int(visual.valid[index].sum())
    if vision.region_maps is not None and visual.order is not None:
        order = visual.order[index, :count].cpu().numpy()
        shown = order >= 0  # the token of an image without superpixels shows no region
        instances_shown = np.full(count, -1)
        instances_shown[shown] = instance_of_region(vision.region_maps[index], labels)[order[shown]]
        return instances_shown
    instances = int(labels.max(initial=-1)) + 1
    if instances == 0:
        return np.full(count, -1)
    one_hot = torch.from_numpy(labels[None] == np.arange(instances)[:, None, None]).float()
    shares = F.adaptive_avg_pool2d(one_hot, vision.patches.grids[index]).flatten(1)  # (instances, N)
    weight = _assignment(visual, index, count) @ shares.T  # (T_b, instances)
    best, owner = weight.max(1)
    return torch.where(best > 0.5, owner, -1).numpy()


def token_places(vision: VisionFeatures, visual: VisualTokens) -> Tensor:
    """Where each token's centroid lies in its image: (B, T, 2) y and x, from 0 to 1.

    Raises:
        ValueError: the projector does not report which patches its tokens come from.
    """
    if visual.assignment is None:
        raise ValueError("This projector does not report which patches its tokens come from; turn place_alignment off.")
    device = visual.tokens.device
    patches = centroids(visual.assignment.detach(), *vision.patches.coordinates())  # (B, T, 2)
    spans = torch.tensor(vision.patches.grids, device=device) * torch.tensor(vision.extents, device=device)  # (B, 2)
    return (patches / spans[:, None]).clamp(0.0, 1.0).float()  # (B, T, 2)


def region_iou(region_map: RegionMap, mask: np.ndarray) -> np.ndarray:
    """IoU of S regions with a 0/1 mask (H, W) of their image at any resolution, at the map's own: (S,) float32."""
    small = nearest(mask, region_map.labels.shape)
    return region_ious(region_map.labels, small, region_map.areas).astype(np.float32)


def grid_iou(assignment: Tensor, mask_share: Tensor) -> Tensor:
    """IoU of every token with a mask when tokens are made of whole patches.

    Args:
        assignment: (T, N) row-stochastic patch weights of each token.
        mask_share: (N,) share of each patch that the mask covers.

    Returns:
        (T,) soft IoU, counting a token's patches by their weight relative to its largest.
    """
    member = assignment / assignment.amax(-1, keepdim=True).clamp_min(1e-6)  # (T, N)
    shared = member @ mask_share  # (T,)
    return shared / (member.sum(-1) + mask_share.sum() - shared).clamp_min(1e-6)


def instance_of_region(region_map: RegionMap, instance_labels: np.ndarray, min_share: float = 0.5) -> np.ndarray:
    """The object that covers more than ``min_share`` of each region, -1 where none does.

    Args:
        region_map: S regions.
        instance_labels: (H, W) int32 object of each pixel, -1 = none, at any resolution of the same image.
        min_share: share of the region's area.

    Returns:
        (S,) int64.
    """
    labels = region_map.labels
    small = nearest(instance_labels, labels.shape)
    count = int(instance_labels.max(initial=-1)) + 1
    if count == 0:
        return np.full(region_map.count, -1)
    both = (labels >= 0) & (small >= 0)
    table = np.bincount(labels[both] * count + small[both], minlength=region_map.count * count)
    share = table.reshape(region_map.count, count) / np.maximum(region_map.areas, 1)[:, None]  # (S, objects)
    return np.where(share.max(1) > min_share, share.argmax(1), -1)


def _assignment(visual: VisualTokens, index: int, count: int) -> Tensor:
    if visual.assignment is None:
        raise ValueError(
            "This projector does not report which patches its tokens come from; turn the auxiliary losses off."
        )
    return visual.assignment[index, :count].detach().float().cpu()  # (T_b, N)
