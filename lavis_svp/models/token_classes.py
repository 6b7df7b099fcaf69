"""What an image classifier sees in the region of each visual token.

The classifier's features are averaged over a token's region, and then over the regions that look alike: a superpixel is
often a part of a thing, and a classifier knows wholes. "Alike" is said by the frozen features, without anything that
learns: the vision encoder's and the classifier's own. On real photographs the second average finds the named thing more
often, and the regions that are as likely make better masks (benchmarks/reports/photographs.md).

A classifier of photographs does not know drawn and rendered things (a named render is picked in a quarter of the cases,
a named thing on a photograph in about half), so a model that learns from composed images would learn not to believe it.
There :class:`DrawnClasses` says in training what a classifier would say of a photograph, mistakes included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_svp.common.tensors import no_autocast
from lavis_svp.common.transfer import to_device
from lavis_svp.projectors.types import VisualTokens
from lavis_svp.vision.feature_extractor import FrozenFeatureExtractor, VisionFeatures

TEMPERATURE = 0.5
"""Of the cosines between regions: the best of six on TrainPhotos, at three sides (benchmarks/class_choices.py)."""
NO_AREA = 1e-6


def token_classes(
    extractor: FrozenFeatureExtractor,
    vision: VisionFeatures,
    visual: VisualTokens,
    temperature: float | None = TEMPERATURE,
) -> Tensor:
    """The classifier's classes in the regions of visual tokens: (B, T, K) log-probabilities.

    Args:
        extractor: holds the classifier.
        vision: frozen features of B images, with the output ``classifier``.
        visual: their visual tokens.
        temperature: of the cosines between regions; None: each region for itself.

    Raises:
        ValueError: the projector does not report which patches its tokens come from, or the temperature is not
            above 0.
    """
    assignment = visual.assignment
    if temperature is not None and temperature <= 0:
        raise ValueError(f"The temperature of the cosines between regions must be above 0, got {temperature}.")
    if assignment is None:
        raise ValueError(
            "This projector does not report which patches its tokens come from; turn seg_prompt.pointer_nouns and "
            "visual_tokens.class_words off."
        )
    assert extractor.classifier is not None
    seen = extractor.classifier_on_patches(vision)  # (B, N, 1280)
    encoded = vision.patches.patches[..., : extractor.vision_encoder.dim]  # (B, N, C), without extra channels
    with no_autocast(seen.device):
        weights = assignment.detach().float()  # (B, T, N)
        means = weights @ seen  # (B, T, 1280)
        if temperature is not None:
            alike = [_cosines(weights @ one.float(), visual.valid) for one in (encoded, seen)]
            similarity = (alike[0] + alike[1]) / (2 * temperature)  # (B, T, T)
            means = _similar_regions(similarity, effective_patches(weights), visual.valid) @ means  # (B, T, 1280)
        return extractor.classifier.class_log_probs(means)  # (B, T, K)


def effective_patches(assignment: Tensor) -> Tensor:
    """The number of patches that a token's weights spread over: (..., T, N) that sum to 1 -> (..., T)."""
    return 1.0 / assignment.square().sum(-1).clamp_min(NO_AREA)


def _cosines(features: Tensor, valid: Tensor) -> Tensor:
    """Cosines between an image's tokens (B, T, C), without what all of them share: (B, T, T)."""
    unit = F.normalize(features, dim=-1)
    real = valid[..., None].float()  # (B, T, 1)
    mean = (unit * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1.0)  # (B, 1, C)
    centred = F.normalize(unit - mean, dim=-1)
    return centred @ centred.transpose(1, 2)


def _similar_regions(similarity: Tensor, areas: Tensor, valid: Tensor) -> Tensor:
    """How much each token takes from each token of its image: (B, T, T), rows sum to 1; large regions count more."""
    scores = similarity + areas.log()[:, None]  # (B, T, T)
    return scores.masked_fill(~valid[:, None], torch.finfo(scores.dtype).min).softmax(-1)


class DrawnClasses(nn.Module):
    """Classes of annotated objects, drawn from their names as a classifier would see photographs of them.

    An object with the names "dog, pet, animal" gets some of the dog breeds; one that no class is named after gets
    classes of its widest names that there are ("giraffe, wild animal": a zebra, a lion). Some objects are taken for
    something else, and some are left as they are seen.

    Args:
        nouns: (V, K) bool, whether a noun names a class.
        share: of the objects, whose classes are drawn.
    """

    SHARPNESS = 1.5
    """How much rare names count more than wide ones, in units of their information."""
    MISTAKEN = 0.15
    """Share of the drawn objects that are taken for something else."""
    LEAST, MOST = 0.15, 0.9
    """The range of the probability that an object's drawn classes get together; a token gets half of it or more."""
    nouns: Tensor

    def __init__(self, nouns: Tensor, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("nouns", nouns, persistent=False)

    @torch.no_grad()
    def forward(self, log_probs: Tensor, owners: Tensor, names: Tensor) -> Tensor:
        """Mix drawn classes into those that are seen.

        Args:
            log_probs: (B, T, K) what the classifier sees.
            owners: (B, T) int64 the object that a token shows, counted through the batch; -1 for none.
            names: (O, J) int64 indices of the nouns that name each object; -1 in padding.

        Returns:
            (B, T, K) log-probabilities. The draws are those of the CPU's generator.
        """
        if not len(names):
            return log_probs
        objects, classes, tokens = len(names), self.nouns.shape[1], owners.numel()
        draws = to_device(torch.rand(objects * (classes + 2) + tokens), log_probs.device)  # all in one copy
        chances, fate, strength, part = draws.split([objects * classes, objects, objects, tokens])
        gumbel = -(-chances.view(objects, classes).clamp(1e-6, 1 - 1e-6).log()).log()  # (O, K)
        drawn = self._drawn(names, gumbel, fate[:, None])  # (O, K), zeros for an object that keeps what is seen
        strength = self.LEAST + (self.MOST - self.LEAST) * strength[:, None]  # (O, 1)
        part = 0.5 + 0.5 * part.view(*owners.shape, 1)  # (B, T, 1)
        added = (strength * drawn)[owners.clamp_min(0)] * (owners >= 0)[..., None] * part  # (B, T, K)
        kept = 1.0 - added.sum(-1, keepdim=True)  # (B, T, 1)
        return (added + kept * log_probs.exp()).clamp_min(torch.finfo(torch.float32).tiny).log()

    def _drawn(self, names: Tensor, gumbel: Tensor, fate: Tensor) -> Tensor:
        """(O, K) distributions over an object's classes; zeros where it has none, or is not among the share.

        Args:
            names: (O, J) as for :meth:`forward`.
            gumbel: (O, K) noise on the classes.
            fate: (O, 1) 0..1, whether an object is drawn, and mistaken.
        """
        information = (self.nouns.shape[1] / self.nouns.sum(1).clamp_min(1)).log()  # (V,)
        known = names >= 0  # (O, J)
        named = self.nouns[names.clamp_min(0)].float() * known[..., None]  # (O, J, K)
        score = (named * information[names.clamp_min(0)][..., None]).sum(1)  # (O, K)
        noisy = (self.SHARPNESS * score + gumbel).masked_fill(score <= 0, -torch.inf)  # (O, K)
        noisy = torch.where(fate < self.share * self.MISTAKEN, gumbel * 2.0, noisy)
        real = (fate < self.share) & (score > 0).any(1, keepdim=True)  # (O, 1)
        return torch.where(real, noisy.masked_fill(~real, 0.0).softmax(1), 0.0)
