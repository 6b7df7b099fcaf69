"""Destructive tests: what SSPE hands out, or the visual tokens, replaced while the model runs.

The replacement is a forward hook that stands only inside :func:`disturbed`; no weight and no method changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavis_svp.common.registry import unknown_name
from lavis_svp.projectors.structures import VisualTokens

RECEIVERS = {
    "sspe": ("sspe_to_vision", "sspe_to_llm"),
    "sspe_ssa": ("sspe_to_vision",),
    "sspe_tokens": ("sspe_to_llm",),
}
"""Which of `svp`'s output heads of SSPE each target names: both, that of SSA, that of the tokens."""
TOKENS = "tokens"
TARGETS = (*RECEIVERS, TOKENS)
MODES = ("average", "shuffle", "swap", "zero", "reorder")


@dataclass(frozen=True)
class Disturbance:
    """What is replaced, and by what.

    Args:
        target: "sspe" (SSPE to SSA and to the tokens), "sspe_ssa", "sspe_tokens", or "tokens", the visual tokens
            themselves, as a control.
        mode: "average": the mean over the training superpixels. "shuffle": permuted among the superpixels of the
            image, which keep their regions. "swap": of the superpixels of a training image. "zero". "reorder", of
            "tokens" only: permuted together with their regions, which should change nothing but the order.
        seed: of permutations and of the choice of other images.

    Raises:
        UnknownNameError: an unknown target or mode.
        ValueError: "reorder" of something else than the tokens.
    """

    target: str
    mode: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise unknown_name("target of a disturbance", self.target, TARGETS)
        if self.mode not in MODES:
            raise unknown_name("mode of a disturbance", self.mode, MODES)
        if self.mode == "reorder" and self.target != TOKENS:
            raise ValueError(f"Only tokens have an order of their own; mode 'reorder' does not fit '{self.target}'.")

    @property
    def random(self) -> bool:
        """Whether the seed matters."""
        return self.mode in ("shuffle", "swap", "reorder")


@dataclass
class Bank:
    """What training images gave: for each source of vectors, a (S_b, W) tensor an image.

    Sources are the names of SSPE's output heads and "tokens".
    """

    images: dict[str, list[Tensor]]

    def __len__(self) -> int:
        return len(self.images[TOKENS])

    def mean(self, source: str) -> Tensor:
        """(W,) mean over all superpixels of all images."""
        return torch.cat(self.images[source]).double().mean(0).float()

    def of_image(self, source: str, index: int, count: int, order: np.ndarray) -> Tensor:
        """(count, W) vectors of an image, in a given order, begun anew where it has fewer."""
        rows = self.images[source][index]
        return rows[torch.as_tensor(order[np.arange(count) % len(rows)], device=rows.device)]


def heads_of(projector: nn.Module, target: str) -> dict[str, nn.Module]:
    """The output heads of SSPE that a target names, by name.

    Raises:
        ValueError: the projector has none of them.
    """
    found = {name: getattr(projector, name, None) for name in RECEIVERS[target]}
    heads = {name: head for name, head in found.items() if isinstance(head, nn.Module)}
    if not heads:
        raise ValueError(f"This projector has no SSPE that '{target}' names; disturb '{TOKENS}' instead.")
    return heads


def targets_of(projector: nn.Module) -> list[str]:
    """The targets that a projector has: one for each output head of SSPE, both together where there are both."""
    names = [name for name in RECEIVERS if all(getattr(projector, head, None) is not None for head in RECEIVERS[name])]
    return [*names, TOKENS]


@torch.no_grad()
def collect(projector: nn.Module, run: Iterator[Any]) -> Bank:
    """Note what SSPE's heads and the projector give while ``run`` goes on.

    Args:
        projector: of the model.
        run: each step runs the projector on a batch, such as ``(model.encode(b) for b in batches)``.

    Raises:
        ValueError: ``run`` had no step.
    """
    heads = heads_of(projector, "sspe") if len(targets_of(projector)) > 1 else {}
    seen: dict[str, Tensor] = {}
    images: dict[str, list[Tensor]] = {name: [] for name in (*heads, TOKENS)}
    with ExitStack() as stack:
        for name, head in heads.items():

            def note(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                seen[name] = output

            stack.enter_context(_hook(head, note))

        def note_tokens(_: nn.Module, __: Any, output: VisualTokens) -> None:
            seen[TOKENS] = output.tokens
            for name, rows in seen.items():
                images[name] += [
                    row[: int(n)].detach().clone() for row, n in zip(rows, output.valid.sum(1), strict=True)
                ]

        stack.enter_context(_hook(projector, note_tokens))
        for _ in run:
            pass
    if not images[TOKENS]:
        raise ValueError("There are no training images to take means and other images' vectors from.")
    return Bank(images)


@contextmanager
def disturbed(projector: nn.Module, disturbance: Disturbance, bank: Bank) -> Iterator[None]:
    """While it lasts, the projector works under the disturbance; afterwards as before.

    Draws follow each other image by image, so that results depend on the seed and the order of the images, not
    on the batch size. The same permutation and the same other image serve all of SSPE's heads.

    Args:
        projector: of the model.
        disturbance: what to do.
        bank: of the same projector.

    Raises:
        ValueError: the projector has no SSPE.
    """
    draws = _Draws(disturbance, bank)
    with ExitStack() as stack:
        if disturbance.target == TOKENS:

            def replace_tokens(_: nn.Module, __: Any, output: VisualTokens) -> VisualTokens:
                draws.start(output.valid.sum(1).tolist())
                return draws.tokens(output)

            stack.enter_context(_hook(projector, replace_tokens))
        else:
            for name, head in heads_of(projector, disturbance.target).items():

                def replace_rows(_: nn.Module, __: Any, output: Tensor, name: str = name) -> Tensor:
                    return draws.rows(name, output)

                stack.enter_context(_hook(head, replace_rows))
            handle = projector.register_forward_pre_hook(lambda _, inputs: draws.start(_counts(projector, inputs)))
            stack.callback(handle.remove)
        yield


def _counts(projector: Any, inputs: Sequence[Any]) -> list[int]:
    superpixels = inputs[1]  # as SvpRis.encode calls it: features, superpixels
    return [max(int(n) + projector.leading, 1) for n in superpixels.valid.sum(1)]


class _Draws:
    """The random choices of one batch at a time, and the replacing."""

    def __init__(self, disturbance: Disturbance, bank: Bank) -> None:
        self.mode, self.bank = disturbance.mode, bank
        self.rng = np.random.default_rng(disturbance.seed)
        self.counts: list[int] = []
        self.orders: list[np.ndarray] = []
        self.others: list[int] = []

    def start(self, counts: list[int]) -> None:
        """Draw for a batch: ``counts`` vectors an image."""
        self.counts, self.orders, self.others = counts, [], []
        images = self.bank.images[TOKENS]
        for count in counts:
            self.others.append(int(self.rng.integers(len(images))))
            size = len(images[self.others[-1]]) if self.mode == "swap" else count
            self.orders.append(self.rng.permutation(size))

    def rows(self, source: str, output: Tensor) -> Tensor:
        """(B, S, W) as it is -> replaced; padding stays."""
        result = output.clone()
        for image, count in enumerate(self.counts):
            result[image, :count] = self._of(source, output[image, :count], image).to(output)
        return result

    def tokens(self, visual: VisualTokens) -> VisualTokens:
        """The visual tokens replaced; their regions stay, but for "reorder"."""
        if self.mode != "reorder":
            return replace(visual, tokens=self.rows(TOKENS, visual.tokens))
        moved = {"tokens": visual.tokens, "assignment": visual.assignment, "order": visual.order}
        return replace(visual, **{name: self._permuted(one) for name, one in moved.items() if one is not None})

    def _permuted(self, rows: Tensor) -> Tensor:
        result = rows.clone()
        for image, (count, order) in enumerate(zip(self.counts, self.orders, strict=True)):
            result[image, :count] = rows[image, torch.as_tensor(order, device=rows.device)]
        return result

    def _of(self, source: str, own: Tensor, image: int) -> Tensor:
        if self.mode == "zero":
            return torch.zeros_like(own)
        if self.mode == "average":
            return self.bank.mean(source).expand_as(own)
        order = self.orders[image]
        if self.mode == "shuffle":
            return own[torch.as_tensor(order, device=own.device)]
        return self.bank.of_image(source, self.others[image], len(own), order)


@contextmanager
def _hook(module: nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
