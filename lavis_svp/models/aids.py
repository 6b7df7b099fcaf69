"""Training aids that the paper does not have; each is a named option, off in the full-scale types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavis_svp.heads.grounding import (
    grid_iou,
    grounding_loss,
    instance_of_region,
    listwise_target,
    region_iou,
    word_alignment_loss,
)
from lavis_svp.heads.mask_head import Frame, SegMaskDecoder
from lavis_svp.heads.readout import SegPrompts
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.models.encoded import Encoded
from lavis_svp.models.options import AuxiliaryLossOptions
from lavis_svp.models.tokens import token_places

PLACE_WORDS = ("left", "right", "above", "below", "top", "bottom")
PLACE_SCALE = 8.0  # a cosine of 1/4 then says "nearly at the edge"; the sides are symmetric, so there is no bias
NO_INSTANCE_WEIGHT = 0.15  # of a token that shows no named instance, in word alignment; measured in the prototype


@dataclass
class AuxiliaryInputs:
    """What the aids on the prompt look at: P expressions with a target."""

    encoded: Encoded
    prompts: SegPrompts
    image: Tensor
    targets: list[np.ndarray]
    head: SegMaskDecoder


class AuxiliaryLosses(nn.Module):
    """Alignment with words and places, listwise grounding and point regression.

    Args:
        options: weights; 0 turns an aid off.
    """

    def __init__(self, options: AuxiliaryLossOptions) -> None:
        super().__init__()
        self.options = options
        if options.word_alignment:
            self.scale = nn.Parameter(torch.tensor([8.0]))
            self.bias = nn.Parameter(torch.tensor([-2.0]))

    def weights(self) -> dict[str, float]:
        """Weight of each aid's loss by its name in the output."""
        return {
            "loss_ground": self.options.grounding,
            "loss_word": self.options.word_alignment,
            "loss_place": self.options.place_alignment,
            "loss_point": self.options.point_regression,
        }

    def in_alignment_stage(self, step: float) -> bool:
        """Whether optimizer step ``step`` (from 0) trains the projector alone."""
        return step < self.options.alignment_steps

    def prompt_losses(self, inputs: AuxiliaryInputs) -> dict[str, Tensor]:
        """Losses on the pointer and on the prompt, of the aids that are on."""
        losses: dict[str, Tensor] = {}
        if self.options.grounding and inputs.prompts.scores is not None:
            rows = [
                listwise_target(token_iou(inputs.encoded, int(image), target))
                for image, target in zip(inputs.image, inputs.targets, strict=True)
            ]
            target = torch.stack(rows).to(inputs.prompts.scores.device)  # (P, T)
            losses["loss_ground"] = grounding_loss(inputs.prompts.scores, target)
        if self.options.point_regression:
            frames = [inputs.encoded.frozen.frames[int(p)] for p in inputs.image]
            centres = torch.stack([_centre(t, f) for t, f in zip(inputs.targets, frames, strict=True)])  # (P, 2)
            centres = centres.to(inputs.prompts.sparse.device)
            wanted = inputs.head.position_of(centres[:, 0], centres[:, 1]) + inputs.head.point_token  # (P, 256)
            losses["loss_point"] = (inputs.prompts.sparse[:, 0].float() - wanted.float()).square().mean()
        return losses

    def alignment_loss(
        self, encoded: Encoded, samples: Mapping[str, Any], language: LanguageModel, device: torch.device
    ) -> Tensor | None:
        """Word alignment over the batch; None when it is off or nothing in the batch is named.

        The words of the batch's instances are each other's negatives.
        """
        instances = samples.get("instances")
        if not self.options.word_alignment or instances is None or not self.training:
            return None
        vocabulary = sorted({w for item in instances if item is not None for words in item["words"] for w in words})
        if len(vocabulary) < 2:
            return None
        column = {word: index for index, word in enumerate(vocabulary)}
        tokens, labels, weights = [], [], []
        for image, item in enumerate(instances):
            if item is None:
                continue
            owner = token_instances(encoded, image, item["labels"])  # (T_b,)
            table = torch.zeros(len(owner), len(vocabulary))
            for row, instance in enumerate(owner.tolist()):
                if instance >= 0:
                    table[row, [column[word] for word in item["words"][instance]]] = 1
            tokens.append(encoded.visual.tokens[image, : len(owner)])
            labels.append(table)
            weight = torch.where(torch.from_numpy(owner) >= 0, 1.0, NO_INSTANCE_WEIGHT)
            if encoded.visual.order is not None:  # a token of the whole image shows all instances, and is left out
                weight[(encoded.visual.order[image, : len(owner)] < 0).cpu()] = 0.0
            weights.append(weight)
        words = word_embeddings(language, vocabulary, device)
        return word_alignment_loss(
            torch.cat(tokens), words, torch.cat(labels).to(device), torch.cat(weights).to(device), self.scale, self.bias
        )

    def place_loss(self, encoded: Encoded, language: LanguageModel) -> Tensor | None:
        """Agreement of every visual token with the words for its place: a token at x is right to x, left to 1 - x.

        A token of the whole image has no place and counts nothing.

        Returns:
            the mean over tokens and words; None when the aid is off.
        """
        if not self.options.place_alignment or not self.training:
            return None
        visual = encoded.visual
        placed = visual.valid if visual.order is None else visual.valid & (visual.order >= 0)  # (B, T)
        y, x = token_places(visual, encoded.frozen)[placed].unbind(1)  # (M,) each
        labels = torch.stack([1 - x, x, 1 - y, y, 1 - y, y], dim=1)  # (M, words)
        words = word_embeddings(language, list(PLACE_WORDS), x.device)  # (words, D)
        scale = torch.full_like(x[:1], PLACE_SCALE)
        return word_alignment_loss(
            visual.tokens[placed], words, labels, torch.ones_like(x), scale, torch.zeros_like(scale)
        )


def word_embeddings(language: LanguageModel, vocabulary: list[str], device: torch.device) -> Tensor:
    """(V, D) mean input embedding of each word's tokens, as the word stands inside a sentence.

    Without gradient: tokens move towards words, not words towards tokens.
    """
    ids = [language.tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in vocabulary]
    embedded = language.embed(
        torch.tensor([one for word in ids for one in word], device=device)
    ).detach()  # (tokens, D)
    return torch.stack([word.mean(0) for word in embedded.split([len(word) for word in ids])])


def token_iou(encoded: Encoded, image: int, target: np.ndarray) -> Tensor:
    """(T,) IoU of each visual token's area with a mask; 0 for padding."""
    visual, maps = encoded.visual, encoded.frozen.region_maps
    result = torch.zeros(visual.valid.shape[1])
    count = int(visual.valid[image].sum())
    if maps is not None and visual.order is not None:
        by_region = torch.from_numpy(region_iou(maps[image], target))
        order = visual.order[image, :count].cpu()
        result[:count] = torch.where(order >= 0, by_region[order.clamp_min(0)], 0.0)
        return result
    share = torch.nn.functional.adaptive_avg_pool2d(
        torch.as_tensor(target)[None].float(), encoded.frozen.features.grids[image]
    ).flatten()  # (N,)
    result[:count] = grid_iou(_assignment(encoded, image, count), share)
    return result


def token_instances(encoded: Encoded, image: int, labels: np.ndarray) -> np.ndarray:
    """(T_b,) instance that each visual token shows, -1 for none."""
    visual, maps = encoded.visual, encoded.frozen.region_maps
    count = int(visual.valid[image].sum())
    if maps is not None and visual.order is not None:
        by_region = instance_of_region(maps[image], labels)
        order = visual.order[image, :count].cpu().numpy()
        return np.where(order >= 0, by_region[np.maximum(order, 0)], -1)
    grid = encoded.frozen.features.grids[image]
    instances = int(labels.max(initial=-1)) + 1
    if instances == 0:
        return np.full(count, -1)
    one_hot = torch.from_numpy(labels[None] == np.arange(instances)[:, None, None]).float()
    shares = torch.nn.functional.adaptive_avg_pool2d(one_hot, grid).flatten(1)  # (instances, N)
    weight = _assignment(encoded, image, count) @ shares.T  # (T_b, instances)
    best, owner = weight.max(1)
    return torch.where(best > 0.5, owner, -1).numpy()


def _assignment(encoded: Encoded, image: int, count: int) -> Tensor:
    if encoded.visual.assignment is None:
        raise ValueError("This projector does not say which patches its tokens come from; turn the aids off.")
    return encoded.visual.assignment[image, :count].detach().float().cpu()


def _centre(target: np.ndarray, frame: Frame) -> Tensor:
    """(2,) x, y of a mask's centroid in SAM's frame, 0 … 1."""
    rows, columns = np.nonzero(target)
    y = (rows.mean() + 0.5) / target.shape[0] * frame.input_size[0] / frame.side
    x = (columns.mean() + 0.5) / target.shape[1] * frame.input_size[1] / frame.side
    return torch.tensor([x, y], dtype=torch.float32)
