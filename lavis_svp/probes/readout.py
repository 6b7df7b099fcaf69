"""Linear read-outs: ridge regression for numbers, multinomial logistic regression for classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap, cluster_sums, ratio_interval

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties tried, in units of the number of examples (the features have variance 1)."""
CHOOSING_SHARE = 0.2
LBFGS_STEPS = 100
LEAST_DEVIATION = 1e-6


class Examples(NamedTuple):
    """What a read-out is fitted or scored on.

    Args:
        features: (M, W) float.
        facts: (M,) numbers; for classes int64, -1 = not known.
        images: M image numbers.
    """

    features: Tensor
    facts: Tensor
    images: np.ndarray

    def among(self, keep: np.ndarray | Tensor) -> Examples:
        """The examples that a bool mask or an index keeps."""
        chosen = np.asarray(keep)
        return Examples(
            self.features[torch.as_tensor(chosen)], self.facts[torch.as_tensor(chosen)], self.images[chosen]
        )


def read_numbers(
    train: Examples, test: Examples, seed: int, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Any]:
    """Fit ridge regression on ``train`` and score R² on ``test``.

    The penalty is chosen on a fifth of the training images, drawn by the seed; the final fit takes all of them.

    Args:
        train: with numbers as facts.
        test: likewise.
        seed: of the choice.
        bootstrap: of the interval, which resamples test images.

    Returns:
        "r2" = 1 - sum of squared errors / sum of squares about the test mean, its "ci", "n", "n_train", "ridge".

    Raises:
        ValueError: fewer than two training images, no test example, or facts that do not vary.
    """
    fit, chosen_on = _split(train, seed)

    def error(ridge: float) -> float:
        return float((_ridge(fit, ridge)(chosen_on.features) - chosen_on.facts).square().mean())

    best = min(RIDGES, key=error)
    squared = (_ridge(train, best)(test.features) - test.facts.double()).square().numpy()
    about = (test.facts.double() - test.facts.double().mean()).square().numpy()
    if not len(about) or about.sum() == 0:
        raise ValueError(f"R² of {len(about)} test examples that do not vary is not defined.")
    names = [""] * len(about)
    interval = ratio_interval(
        cluster_sums(squared, test.images.tolist(), names),
        cluster_sums(about, test.images.tolist(), names),
        bootstrap,
    )
    return {
        "r2": float(1 - squared.sum() / about.sum()),
        "ci": None if interval is None else (1 - interval[1], 1 - interval[0]),
        "n": len(about),
        "n_train": len(train.facts),
        "ridge": best,
    }


def read_classes(
    train: Examples, test: Examples, classes: int, seed: int, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Any]:
    """Fit multinomial logistic regression on ``train`` and score accuracy on ``test``.

    Args:
        train: with classes as facts; those of -1 are left out.
        test: likewise.
        classes: how many.
        seed: of the images on which the penalty is chosen.
        bootstrap: of the interval, which resamples test images.

    Returns:
        "accuracy", its "ci", "majority" (of the most frequent class of training), "n", "n_train", "ridge".

    Raises:
        ValueError: fewer than two training images, or no test example.
    """
    train, test = train.among(train.facts.numpy() >= 0), test.among(test.facts.numpy() >= 0)
    if not len(test.facts):
        raise ValueError("There is no test example whose class is known.")
    fit, chosen_on = _split(train, seed)

    def error(ridge: float) -> float:
        return float(F.cross_entropy(_logistic(fit, classes, ridge)(chosen_on.features), chosen_on.facts))

    best = min(RIDGES[:-1], key=error)
    right = (_logistic(train, classes, best)(test.features).argmax(1) == test.facts).numpy()
    names = [""] * len(right)
    most = torch.bincount(train.facts, minlength=classes).argmax()
    return {
        "accuracy": float(right.mean()),
        "ci": ratio_interval(
            cluster_sums(right, test.images.tolist(), names),
            cluster_sums(np.ones(len(right)), test.images.tolist(), names),
            bootstrap,
        ),
        "majority": float((test.facts == most).float().mean()),
        "n": len(right),
        "n_train": len(train.facts),
        "ridge": best,
    }


def _split(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    images = np.unique(examples.images)
    if len(images) < 2:
        raise ValueError(f"A read-out needs at least two training images, got {len(images)}.")
    count = max(1, round(CHOOSING_SHARE * len(images)))
    held = np.isin(examples.images, np.random.default_rng(seed).permutation(images)[:count])
    return examples.among(~held), examples.among(held)


class _Linear:
    """Standardisation and a linear map; called on (M, W) features."""

    def __init__(self, features: Tensor) -> None:
        double = features.double()
        self.mean = double.mean(0)
        self.scale = double.std(0, unbiased=False).clamp_min(LEAST_DEVIATION)
        self.weight = torch.zeros(features.shape[1], 1, dtype=torch.float64)
        self.bias: Tensor = torch.zeros(1, dtype=torch.float64)

    def standardised(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.scale

    def __call__(self, features: Tensor) -> Tensor:
        out = self.standardised(features) @ self.weight + self.bias  # (M, K)
        return out[:, 0] if out.shape[1] == 1 else out


def _ridge(examples: Examples, penalty: float) -> _Linear:
    model = _Linear(examples.features)
    x, y = model.standardised(examples.features), examples.facts.double()
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    model.bias = y.mean()[None]
    model.weight = torch.linalg.solve(x.T @ x + penalty * len(x) * eye, x.T @ (y - y.mean()))[:, None]
    return model


def _logistic(examples: Examples, classes: int, penalty: float) -> _Linear:
    model = _Linear(examples.features)
    x, y = model.standardised(examples.features).float(), examples.facts
    with torch.enable_grad():
        weight = torch.zeros(x.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, y) + 0.5 * penalty * weight.square().sum() / classes
            loss.backward()
            return loss

        optimizer.step(closure)
    model.weight, model.bias = weight.detach().double(), bias.detach().double()
    return model


def spread(results: Sequence[dict[str, Any]], score: str) -> dict[str, Any]:
    """The result of the first seed, with all seeds' scores beside it."""
    return {**results[0], "by_seed": [one[score] for one in results]}
