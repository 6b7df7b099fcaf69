"""What the tokens know of the objects that they show, at three places between encoder and language model.

Linear read-outs show whether a fact can be read off a token at all. Shares of variance show how much of a token is
about it: a small part is learned late, whatever a read-out finds. Made for RefShapes, whose objects are annotated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.language.splice import VISUAL, splice
from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap
from lavis_svp.probes.readout import Examples, read_classes, read_numbers, spread
from lavis_svp.probes.session import instances_of
from lavis_svp.segmentation.auxiliary_losses import token_instances

PLACES = ("encoder", "tokens", "language")
"""Encoder patches averaged by the token's assignment; the visual tokens; the language model's last states at them."""
NUMBERS = ("x", "y", "area", "height", "width")
RELATIONS: Mapping[str, tuple[str, float]] = {
    "left_of": ("x", -1.0),
    "above": ("y", -1.0),
    "larger_than": ("area", 1.0),
}
"""Relation of a to b -> the number that decides it, and the sign of a's minus b's number where it holds."""
MAX_TOKENS = 32
"""Tokens kept of an image at most, drawn by the seed: with one token per patch, hundreds show objects."""
MAX_PAIRS = 16
"""Ordered pairs of tokens kept of an image at most, drawn by the seed."""
ANY_TEXT = "object"
"""A sequence needs text after the image; its words do not matter, because visual tokens do not attend to them."""
FREQUENCIES = 3  # of the sine and cosine code of a coordinate
POWERS = 3  # of a size


def attribute_classes(words: Sequence[str]) -> dict[str, int]:
    """Each of RefShapes' attributes as a class number, -1 where the words do not name exactly one value."""
    classes = {}
    for name, values in ATTRIBUTES.items():
        named = [number for number, value in enumerate(values) if value in words]
        classes[name] = named[0] if len(named) == 1 else -1
    return classes


def instance_numbers(labels: np.ndarray) -> dict[int, dict[str, float]]:
    """Centroid, area and box of every visible instance of ``labels`` (H, W), where -1 is none.

    Returns:
        {instance: {"x", "y", "height", "width" as shares of the image's sides, "area" as a share of the image}}.
    """
    height, width = labels.shape
    numbers = {}
    for instance in np.unique(labels[labels >= 0]).tolist():
        rows, columns = np.nonzero(labels == instance)
        numbers[instance] = {
            "x": float((columns.mean() + 0.5) / width),
            "y": float((rows.mean() + 0.5) / height),
            "area": len(rows) / labels.size,
            "height": float((rows.max() - rows.min() + 1) / height),
            "width": float((columns.max() - columns.min() + 1) / width),
        }
    return numbers


def relation_holds(name: str, a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether a relation of :data:`RELATIONS` holds of a and b, by :func:`instance_numbers`."""
    number, sign = RELATIONS[name]
    return sign * (a[number] - b[number]) > 0


class ObjectTokens:
    """Tokens that show an object, with the facts about the object; collected image by image.

    Args:
        seed: of the draws where an image has too many tokens or pairs.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.features: dict[str, list[Tensor]] = {place: [] for place in PLACES}
        self.facts: list[dict[str, float]] = []
        self.images: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.count = 0

    def add(self, rows: Mapping[str, Tensor], facts: Sequence[Mapping[str, float] | None]) -> None:
        """Add an image's tokens.

        Args:
            rows: place -> (T_b, W).
            facts: of the object that each token shows; None for a token that shows none.
        """
        kept = np.array([token for token, fact in enumerate(facts) if fact is not None], int)
        if len(kept) > MAX_TOKENS:
            kept = np.sort(self.rng.choice(kept, MAX_TOKENS, replace=False))
        start = len(self.facts)
        for place, features in rows.items():
            self.features[place].append(features[torch.from_numpy(kept)].float().cpu())
        self.facts += [dict(facts[token] or {}) for token in kept]
        self.images += [self.count] * len(kept)
        self.count += 1
        own = range(start, len(self.facts))
        pairs = [(a, b) for a in own for b in own if self.facts[a]["instance"] != self.facts[b]["instance"]]
        drawn = self.rng.permutation(len(pairs))[:MAX_PAIRS]
        self.pairs += [pairs[index] for index in drawn]

    def at(self, place: str) -> np.ndarray:
        """(M, W) float64 features of all kept tokens."""
        return torch.cat(self.features[place]).double().numpy()

    def examples(self, place: str, fact: str) -> Examples:
        """Tokens with one of their facts: a number, or a class for an attribute."""
        values = np.array([row[fact] for row in self.facts], np.int64 if fact in ATTRIBUTES else np.float64)
        return Examples(self.at(place), values, np.array(self.images))

    def related(self, place: str, relation: str) -> Examples:
        """Differences a - b of the tokens of pairs, with whether the relation holds of a and b."""
        first, second = (np.array([pair[side] for pair in self.pairs], np.int64) for side in (0, 1))
        rows = self.at(place)
        holds = [int(relation_holds(relation, self.facts[a], self.facts[b])) for a, b in self.pairs]
        return Examples(rows[first] - rows[second], np.array(holds, np.int64), np.array(self.images)[first])


@torch.no_grad()
def gather_tokens(model: Any, batches: Iterable[Mapping[str, Any]], seed: int) -> ObjectTokens:
    """Run the model over batches and keep the tokens that show objects.

    Args:
        model: a svp_ris in evaluation mode.
        batches: with ``instances``; items of the same image count once.
        seed: of the draws.

    Raises:
        ValueError: the data have no instances, or the projector does not report which patches its tokens come from.
    """
    tokens, seen = ObjectTokens(seed), set()
    for samples in batches:
        encoded = model.encode(samples)
        vision, visual = encoded.vision, encoded.visual
        if visual.assignment is None:
            raise ValueError("This projector does not report which patches its tokens come from; it cannot be probed.")
        pooled = visual.assignment.float() @ vision.patches.patches.float()  # (B, T, C)
        states = _language_states(model, encoded)
        for index, count in enumerate(encoded.counts):
            name = (samples["image_id"][index], samples["file_name"][index])
            if name in seen:
                continue
            seen.add(name)
            labels, words = instances_of(samples, index)
            numbers = instance_numbers(labels)
            facts = [
                {"instance": owner, **numbers[owner], **attribute_classes(words[owner])} if owner >= 0 else None
                for owner in token_instances(vision, visual, index, labels).tolist()
            ]
            rows = {"encoder": pooled[index, :count], "tokens": visual.tokens[index, :count], "language": states[index]}
            tokens.add(rows, facts)
    return tokens


def _language_states(model: Any, encoded: Any) -> list[Tensor]:
    """The language model's last states at the visual tokens of each image: B tensors (T_b, D)."""
    language = model.language
    turn = model.prompt_builder.segmentation_turn(ANY_TEXT, model.options.prompt.answers[0], index=0)
    turns = [[turn]] * len(encoded.counts)
    batch = splice(
        model.prompt_builder.prefix_ids(), encoded.counts, turns, "packed", language.max_length, model.device
    )
    states = language.read(batch, encoded.visual.tokens)  # (B, L, D)
    return [row[ids == VISUAL] for row, ids in zip(states, batch.ids, strict=True)]


def read_all(
    train: ObjectTokens, test: ObjectTokens, seeds: Sequence[int], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, dict[str, Any]]:
    """Read every fact at every place.

    Args:
        train: see :func:`gather_tokens`.
        test: likewise, of the split that is scored.
        seeds: of the images on which penalties are chosen; the first one's result is kept with its interval.
        bootstrap: of the intervals.

    Returns:
        {place: {fact: result}}: attributes and relations with "accuracy", numbers with "r2", all with "by_seed".
    """
    result: dict[str, dict[str, Any]] = {}
    for place in PLACES:
        facts: dict[str, Any] = {}
        for name, values in ATTRIBUTES.items():
            pair = train.examples(place, name), test.examples(place, name)
            facts[name] = spread([read_classes(*pair, len(values), seed, bootstrap) for seed in seeds], "accuracy")
        for name in NUMBERS:
            pair = train.examples(place, name), test.examples(place, name)
            facts[name] = spread([read_numbers(*pair, seed, bootstrap) for seed in seeds], "r2")
        for name in RELATIONS:
            pair = train.related(place, name), test.related(place, name)
            facts[name] = spread([read_classes(*pair, 2, seed, bootstrap) for seed in seeds], "accuracy")
        result[place] = facts
    return result


def variance_shares(tokens: ObjectTokens) -> dict[str, dict[str, float]]:
    """The share of the tokens' variance that each part of the facts explains (least squares, R²).

    Args:
        tokens: many more than the regressors, about forty.

    Returns:
        {place: {"look": by the four attributes, "place": by a sine and cosine code of x and y, "size": by powers of
        area, height and width}}. The parts overlap; they need not add up to one.
    """

    def number(name: str) -> np.ndarray:
        return np.array([row[name] for row in tokens.facts], np.float64)

    look = [number(name) == value for name, values in ATTRIBUTES.items() for value in range(len(values))]
    place = [
        wave(k * math.pi * number(name))
        for name in ("x", "y")
        for k in range(1, FREQUENCIES + 1)
        for wave in (np.sin, np.cos)
    ]
    size = [number(name) ** power for name in ("area", "height", "width") for power in range(1, POWERS + 1)]
    parts = {"look": look, "place": place, "size": size}
    regressors = {part: np.stack(columns, 1).astype(float) for part, columns in parts.items()}  # (M, K) each
    return {
        where: {part: _explained(design, tokens.at(where)) for part, design in regressors.items()} for where in PLACES
    }


def _explained(regressors: np.ndarray, features: np.ndarray) -> float:
    """R² of all features together: (M, K) and (M, W) to a share of the total variance."""
    fitted = LinearRegression().fit(regressors, features).predict(regressors)
    mean = features.mean(0)
    return float(np.square(fitted - mean).sum() / np.square(features - mean).sum())


def format_readouts(result: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the read-outs: one line a fact, one column a place, with intervals."""
    places = list(result)
    lines = [f"{'fact':12}{'score':>10}{'chance':>8}" + "".join(f"{place:>26}" for place in places)]
    for fact, first in result[places[0]].items():
        score = "r2" if "r2" in first else "accuracy"
        line = f"{fact:12}{score:>10}{first.get('majority', 0.0):>8.2f}"
        for place in places:
            one = result[place][fact]
            low, high = one["ci"] or (float("nan"),) * 2
            line += f"{f'{one[score]:.3f} ({low:.3f} to {high:.3f})':>26}"
        lines.append(line)
    return "\n".join(lines)


def format_tokens(result: Mapping[str, Any]) -> str:
    """Format the read-outs and the shares of variance."""
    shares = result["variance"]
    parts = list(next(iter(shares.values())))
    lines = [format_readouts(result["places"]), "", f"{'share of variance':20}" + "".join(f"{p:>8}" for p in parts)]
    lines += [f"{place:20}" + "".join(f"{row[part]:>8.3f}" for part in parts) for place, row in shares.items()]
    return "\n".join(lines)
