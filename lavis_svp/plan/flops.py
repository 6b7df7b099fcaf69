"""Floating-point operations: counted as the real modules run on the meta device, and what training makes of them.

One multiplication and one addition are two operations, as everywhere in this package. Only products count (matrix
products, convolutions, attention); norms, activations and resizing are left out, as ``FlopCounterMode`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
ACTIVATION_PRODUCTS = ("bmm", "baddbmm", "attention")  # both factors are activations; else one is a parameter


@dataclass(frozen=True)
class Flops:
    """Operations, told apart by what training makes of them.

    Args:
        weights: products of activations with parameters.
        mixing: products of activations with each other: attention, pooling.
    """

    weights: float = 0.0
    mixing: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.mixing

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.weights + other.weights, self.mixing + other.mixing)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.weights * factor, self.mixing * factor)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count what runs inside; tensors on the meta device are not computed.

    Not under ``no_grad``: the counter hangs hooks on whatever passes a module, and fails where parameters that train
    have no gradient function.
    """
    with FlopCounterMode(display=False) as counter:
        yield counter


def count(run: Callable[[], T]) -> tuple[Flops, T]:
    """Count the operations of ``run`` on the meta device.

    Args:
        run: calls modules that lie on the meta device; tensors it makes lie there, too.

    Returns:
        the operations, and what ``run`` returned.
    """
    with counting() as counter, torch.device("meta"):
        result = run()
    return counted(counter), result


def counted(counter: FlopCounterMode) -> Flops:
    """What a counter has seen."""
    by_operator: dict[Any, int] = counter.get_flop_counts().get("Global", {})
    mixing = sum(number for operator, number in by_operator.items() if _mixes(str(operator)))
    return Flops(float(sum(by_operator.values()) - mixing), float(mixing))


def _mixes(operator: str) -> bool:
    return any(name in operator for name in ACTIVATION_PRODUCTS)


def training_flops(forward: Flops, trained: float, gradient_flows: bool, recompute: bool = False) -> Flops:
    """Operations of a training step, from those of its forward pass.

    A product with a parameter costs the same again for the gradient of its input, and again for that of the
    parameter if it trains. A product of two activations costs twice more. A part without gradients costs its forward
    pass alone. A frozen part between trained ones still passes gradients of activations. Gradient checkpointing runs
    the forward pass twice.

    Args:
        forward: of the forward pass.
        trained: share of ``forward.weights`` whose parameters train, 0 to 1.
        gradient_flows: whether gradients pass through at all.
        recompute: gradient checkpointing.
    """
    if not gradient_flows:
        return forward
    again = 1 if recompute else 0
    return Flops(forward.weights * (2 + trained + again), forward.mixing * (3 + again))
