"""What the tokens know: linear read-outs at several places on the way from the encoder to the language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.language.splice import VISUAL, splice
from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap
from lavis_svp.models.aids import token_instances
from lavis_svp.probes.facts import NUMBERS, RELATIONS, attribute_classes, instance_numbers, relation_holds
from lavis_svp.probes.readout import Examples, read_classes, read_numbers, spread
from lavis_svp.probes.session import instances_of

PLACES = ("encoder", "tokens", "language")
"""Patches averaged as the token's assignment says; the visual tokens; the language model's last states at them."""
TOKENS_PER_IMAGE = 32
"""Most tokens of an image that are kept, drawn by the seed: with a token a patch, hundreds show objects."""
PAIRS_PER_IMAGE = 16
"""Most ordered pairs of tokens of an image, drawn by the seed."""
ANY_TEXT = "object"
"""A sequence needs text after the image; what it says does not matter, since visual tokens do not see it."""


class Shown:
    """Tokens that show an object, with what is true of it; grows image by image.

    Args:
        seed: of the draws where an image has too many.
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
        if len(kept) > TOKENS_PER_IMAGE:
            kept = np.sort(self.rng.choice(kept, TOKENS_PER_IMAGE, replace=False))
        start = len(self.facts)
        for place, found in rows.items():
            self.features[place].append(found[torch.from_numpy(kept)].float().cpu())
        self.facts += [dict(facts[token] or {}) for token in kept]
        self.images += [self.count] * len(kept)
        self.count += 1
        own = range(start, len(self.facts))
        pairs = [(a, b) for a in own for b in own if self.facts[a]["instance"] != self.facts[b]["instance"]]
        chosen = self.rng.permutation(len(pairs))[:PAIRS_PER_IMAGE]
        self.pairs += [pairs[index] for index in chosen]

    def at(self, place: str) -> Tensor:
        """(M, W) features of all kept tokens."""
        return torch.cat(self.features[place])

    def examples(self, place: str, fact: str) -> Examples:
        """Tokens with one of their facts: a number, or a class for an attribute."""
        kind = torch.int64 if fact in ATTRIBUTES else torch.float64
        values = torch.tensor([row[fact] for row in self.facts], dtype=kind)
        return Examples(self.at(place), values, np.array(self.images))

    def related(self, place: str, relation: str) -> Examples:
        """Differences a - b of the tokens of pairs, with whether the relation holds of a and b."""
        first, second = (torch.tensor([pair[side] for pair in self.pairs], dtype=torch.long) for side in (0, 1))
        rows = self.at(place)
        holds = [int(relation_holds(relation, self.facts[a], self.facts[b])) for a, b in self.pairs]
        images = np.array(self.images)[first.numpy()]
        return Examples(rows[first] - rows[second], torch.tensor(holds, dtype=torch.long), images)


@torch.no_grad()
def gather_shown(model: Any, batches: Iterable[Mapping[str, Any]], seed: int) -> Shown:
    """Run the model over batches and keep the tokens that show objects.

    Args:
        model: a svp_ris in evaluation mode.
        batches: with ``instances``; each image once (items of the same image are taken once).
        seed: of the draws.

    Raises:
        ValueError: no instances in the data, or a projector that does not say where its tokens come from.
    """
    shown, seen = Shown(seed), set()
    for samples in batches:
        encoded = model.encode(samples)
        if encoded.visual.assignment is None:
            raise ValueError("This projector does not say which patches its tokens come from; it cannot be probed.")
        pooled = encoded.visual.assignment.float() @ encoded.frozen.features.patches.float()  # (B, T, C)
        states = _states(model, encoded)
        for image, count in enumerate(encoded.counts):
            name = (samples["image_id"][image], samples["file_name"][image])
            if name in seen:
                continue
            seen.add(name)
            labels, words = instances_of(samples, image)
            numbers = instance_numbers(labels)
            facts = [
                {"instance": owner, **numbers[owner], **attribute_classes(words[owner])} if owner >= 0 else None
                for owner in token_instances(encoded, image, labels).tolist()
            ]
            tokens = encoded.visual.tokens[image, :count]
            shown.add({"encoder": pooled[image, :count], "tokens": tokens, "language": states[image]}, facts)
    return shown


def _states(model: Any, encoded: Any) -> list[Tensor]:
    """The language model's last states at the visual tokens of each image; no text after them is seen."""
    turn = model.prompts.turn(ANY_TEXT, model.options.prompt.answers[0], index=0)
    language = model.language
    plan = splice(
        model.prompts.prefix_ids(),
        encoded.counts,
        [[turn]] * len(encoded.counts),
        "packed",
        language.max_length,
        model.device,
        encoded.positions,
    )
    embeddings = plan.embeddings(language.embed(plan.ids), encoded.visual.tokens)
    states = language(embeddings, plan.attention_mask(embeddings.dtype), plan.positions)  # (B, L, D)
    return [row[ids == VISUAL] for row, ids in zip(states, plan.ids, strict=True)]


def read_all(
    train: Shown, test: Shown, seeds: Sequence[int], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, dict[str, Any]]:
    """Every fact at every place.

    Args:
        train: see :func:`gather_shown`.
        test: likewise, of the split that is scored.
        seeds: of the images on which penalties are chosen; the first one's result is kept with its interval.
        bootstrap: of the intervals.

    Returns:
        {place: {fact: result}}: attributes and relations with "accuracy", numbers with "r2", all with "by_seed".
    """
    result: dict[str, dict[str, Any]] = {}
    for place in PLACES:
        found: dict[str, Any] = {}
        for name, values in ATTRIBUTES.items():
            one, other = train.examples(place, name), test.examples(place, name)
            found[name] = spread([read_classes(one, other, len(values), seed, bootstrap) for seed in seeds], "accuracy")
        for name in NUMBERS:
            one, other = train.examples(place, name), test.examples(place, name)
            found[name] = spread([read_numbers(one, other, seed, bootstrap) for seed in seeds], "r2")
        for name in RELATIONS:
            one, other = train.related(place, name), test.related(place, name)
            found[name] = spread([read_classes(one, other, 2, seed, bootstrap) for seed in seeds], "accuracy")
        result[place] = found
    return result


def format_readouts(result: Mapping[str, Mapping[str, Any]]) -> str:
    """As text: one line a fact, one column a place, with intervals."""
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
