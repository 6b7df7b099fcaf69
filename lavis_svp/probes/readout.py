"""Linear read-outs: how well ridge or logistic regression reads a fact off features.

The penalty is chosen on a fifth of the training *images*: scikit-learn's RidgeCV leaves out single examples, whose
neighbours in the same image give them away. On synthetic examples (400 images of 20, 384 features, noise shared in an
image) it chose penalties 300 times smaller, and R² on new images was -.03, with ours .23 (means of 6 seeds). With 100
images both reached .30; with 60, and 150 features, RidgeCV was ahead, .26 to .21 (20 seeds): ours then had 12 images to
choose on. Intervals resample test images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap, cluster_sums, ratio_interval

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties that are tried, in units of the number of examples (the features are scaled to variance 1)."""
CHOOSING_SHARE = 0.2
MAX_ITERATIONS = 1000


class Examples(NamedTuple):
    """The examples that a read-out is fitted to or scored on."""

    features: np.ndarray  # (M, W) float
    facts: np.ndarray  # (M,) numbers; for classes int64, -1 = unknown
    images: np.ndarray  # (M,) image numbers

    def select(self, keep: np.ndarray) -> Examples:
        """The examples that a bool mask keeps."""
        return Examples(self.features[keep], self.facts[keep], self.images[keep])


def read_numbers(
    train: Examples, test: Examples, seed: int, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Any]:
    """Fit ridge regression on ``train`` and score R² on ``test``, both with numbers as facts.

    Args:
        train: examples to fit.
        test: examples to score.
        seed: of the training images on which the penalty is chosen; the final fit takes all of them.
        bootstrap: of the interval, which resamples test images.

    Returns:
        "r2" = 1 - sum of squared errors / sum of squares about the test mean, its "ci", "n", "n_train", "ridge".

    Raises:
        ValueError: there are fewer than two training images, no test example, or facts that do not vary.
    """

    def fit(examples: Examples, ridge: float) -> Any:
        model = make_pipeline(StandardScaler(), Ridge(alpha=ridge * len(examples.facts)))
        return model.fit(examples.features, examples.facts)

    def loss(model: Any, held: Examples) -> float:
        return mean_squared_error(held.facts, model.predict(held.features))

    best = _best_ridge(train, RIDGES, seed, fit, loss)
    about = np.square(test.facts - test.facts.mean()) if len(test.facts) else np.zeros(0)
    if about.sum() == 0:
        raise ValueError(f"R² of {len(about)} test examples that do not vary is not defined.")
    squared = np.square(fit(train, best).predict(test.features) - test.facts)
    interval = _interval(squared, about, test.images, bootstrap)
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
        classes: number of classes.
        seed: of the training images on which the penalty is chosen.
        bootstrap: of the interval, which resamples test images.

    Returns:
        "accuracy", its "ci", "majority" (of the most frequent class of training), "n", "n_train", "ridge".

    Raises:
        ValueError: there are fewer than two training images, or no test example.
    """
    train, test = train.select(train.facts >= 0), test.select(test.facts >= 0)
    if not len(test.facts):
        raise ValueError("There is no test example whose class is known.")

    def fit(examples: Examples, ridge: float) -> Any:
        if len(np.unique(examples.facts)) < 2:
            return DummyClassifier().fit(examples.features, examples.facts)
        # The mean loss + ridge / 2 * (mean square of the classes' weights). With two classes scikit-learn has one
        # weight vector, the difference of the two: half as large a sum of squares.
        scale = 2 * classes if len(np.unique(examples.facts)) == 2 else classes
        logistic = LogisticRegression(C=scale / (ridge * len(examples.facts)), max_iter=MAX_ITERATIONS)
        return make_pipeline(StandardScaler(), logistic).fit(examples.features, examples.facts)

    def loss(model: Any, held: Examples) -> float:
        probabilities = np.zeros((len(held.facts), classes))
        probabilities[:, model.classes_] = model.predict_proba(held.features)
        return log_loss(held.facts, probabilities, labels=np.arange(classes))

    best = _best_ridge(train, RIDGES[:-1], seed, fit, loss)
    correct = fit(train, best).predict(test.features) == test.facts
    return {
        "accuracy": float(correct.mean()),
        "ci": _interval(correct, np.ones(len(correct)), test.images, bootstrap),
        "majority": float((test.facts == np.bincount(train.facts, minlength=classes).argmax()).mean()),
        "n": len(correct),
        "n_train": len(train.facts),
        "ridge": best,
    }


def spread(results: Sequence[dict[str, Any]], score: str) -> dict[str, Any]:
    """The result of the first seed, with the scores of all seeds in "by_seed"."""
    return {**results[0], "by_seed": [result[score] for result in results]}


def _best_ridge(
    train: Examples,
    ridges: Sequence[float],
    seed: int,
    fit: Callable[[Examples, float], Any],
    loss: Callable[[Any, Examples], float],
) -> float:
    """The penalty with the lowest loss on a fifth of the training images after a fit to the others."""
    images = np.unique(train.images)
    if len(images) < 2:
        raise ValueError(f"A read-out needs at least two training images, got {len(images)}.")
    count = max(1, round(CHOOSING_SHARE * len(images)))
    held = np.isin(train.images, np.random.default_rng(seed).permutation(images)[:count])
    return min(ridges, key=lambda ridge: loss(fit(train.select(~held), ridge), train.select(held)))


def _interval(
    numerators: np.ndarray, denominators: np.ndarray, images: np.ndarray, bootstrap: Bootstrap
) -> tuple[float, float] | None:
    names = images.tolist()
    return ratio_interval(cluster_sums(numerators, names), cluster_sums(denominators, names), bootstrap)
