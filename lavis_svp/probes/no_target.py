"""The no-target fit: what tells a model that there is no such thing, and the calibration ``model.no_target``.

The calibration is fitted on one split and scored on another. For each weight of the pointer's evidence, the bias is set
so that of no kind of expression with a target more than a chosen share is refused. The weight that then refuses most of
the expressions without a target is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from lavis_svp.metrics.report import NO_TARGET
from lavis_svp.segmentation.no_target import CALIBRATION_KEY, NoTargetOptions

WEIGHTS = (0.0, *(2.0 ** (step / 2) for step in range(-4, 13)))  # tried for the evidence; the first of equals is taken


@dataclass(frozen=True)
class Evidence:
    """What speaks for ``[SEG]`` in M expressions."""

    margin: np.ndarray  # (M,) score of ``[SEG]`` above the best other word's, by the language model
    evidence: np.ndarray  # (M,) log-probability of the pointer's best token
    kinds: np.ndarray  # (M,) kind of each; ``no_target`` where there is no such thing

    def score(self, options: NoTargetOptions) -> np.ndarray:
        """(M,) above 0 where the model writes ``[SEG]`` under a calibration."""
        return self.margin + options.bias + options.evidence * self.evidence

    @property
    def target_kinds(self) -> list[str]:
        """Kinds of expressions with a target."""
        return sorted(set(self.kinds.tolist()) - {NO_TARGET})


def gather_evidence(model: Any, batches: Iterable[Mapping[str, Any]]) -> Evidence:
    """Collect the evidence of every expression of a split's batches from a ``svp_ris`` in evaluation mode."""
    margins, evidence, kinds = [], [], []
    for samples in batches:
        batch = model.no_target_evidence(samples)
        margins += batch.margin.tolist()
        evidence += batch.evidence.tolist()
        places = zip(batch.image_index.tolist(), batch.expression.tolist(), strict=True)
        kinds += [samples["kinds"][image][number] for image, number in places]
    return Evidence(np.array(margins), np.array(evidence), np.array(kinds))


def fit_calibration(split: Evidence, max_refused: float) -> NoTargetOptions:
    """Fit bias and weight.

    Args:
        split: evidence on images that the model was not trained on.
        max_refused: share of the expressions of a kind with a target that may be refused, in [0, 1); to the nearest
            quantile, so that with few expressions it can be one of them more.

    Raises:
        ValueError: the share is outside of [0, 1), or all expressions have a target, or none has.
    """
    if not 0 <= max_refused < 1:
        raise ValueError(f"The share of refused expressions must be in [0, 1), got {max_refused}.")
    has_target = split.kinds != NO_TARGET
    if has_target.all() or not has_target.any():
        raise ValueError(f"Calibration needs expressions with and without a target, got {sorted(set(split.kinds))}.")

    def calibrated(weight: float) -> NoTargetOptions:
        scores = split.score(NoTargetOptions(0.0, weight))
        lowest = min(float(np.quantile(scores[split.kinds == kind], max_refused)) for kind in split.target_kinds)
        return NoTargetOptions(-lowest, weight)

    return max(map(calibrated, WEIGHTS), key=lambda options: score_calibration(split, options)["n_acc"])


def score_calibration(split: Evidence, options: NoTargetOptions) -> dict[str, Any]:
    """Shares refused under a calibration, and how well the score separates the kinds.

    Returns:
        "n_acc" (share of ``no_target`` that is refused), "refused" by kind with a target, and "auc" by kind: the
        chance that an expression of it scores above one without a target, ties counting half.
    """
    scores = split.score(options)
    empty = scores[split.kinds == NO_TARGET]
    by_kind = {kind: scores[split.kinds == kind] for kind in split.target_kinds}
    return {
        "n_acc": float((empty <= 0).mean()),
        "refused": {kind: float((values <= 0).mean()) for kind, values in by_kind.items()},
        "auc": {
            kind: float(roc_auc_score([1] * len(values) + [0] * len(empty), np.concatenate([values, empty])))
            for kind, values in by_kind.items()
        },
    }


def no_target_table(fit_split: Evidence, test_split: Evidence, max_refused: float) -> dict[str, Any]:
    """:func:`fit_calibration` on one split, scores on another: the language model alone, the pointer, and both."""
    chosen = fit_calibration(fit_split, max_refused)
    pointer = Evidence(np.zeros_like(test_split.margin), test_split.evidence, test_split.kinds)
    return {
        CALIBRATION_KEY: {"bias": round(chosen.bias, 3), "evidence": round(chosen.evidence, 3)},
        "refused_at_most": max_refused,
        "expressions": {"fitted": len(fit_split.kinds), "judged": len(test_split.kinds)},
        "language model alone": score_calibration(test_split, NoTargetOptions()),
        "pointer alone": {"auc": score_calibration(pointer, NoTargetOptions(0.0, 1.0))["auc"]},
        "calibrated": score_calibration(test_split, chosen),
    }


def format_no_target(table: Mapping[str, Any]) -> str:
    """Format the table, and the calibration as overrides of a YAML."""
    kinds = list(table["calibrated"]["auc"])
    head = [f"{'':22}{'N-acc':>8}", *(f"{'refused ' + k:>22}" for k in kinds), *(f"{'AUC ' + k:>18}" for k in kinds)]
    lines = ["".join(head)]
    for name in ("language model alone", "pointer alone", "calibrated"):
        row = table[name]
        refused = row.get("refused", {})
        n_acc = f"{row['n_acc']:>8.3f}" if "n_acc" in row else f"{'':8}"
        cells = "".join(f"{refused[k]:>22.3f}" if k in refused else f"{'':22}" for k in kinds)
        lines.append(f"{name:22}{n_acc}{cells}" + "".join(f"{row['auc'][k]:>18.3f}" for k in kinds))
    chosen = table[CALIBRATION_KEY]
    lines.append(f"model.no_target.bias={chosen['bias']} model.no_target.evidence={chosen['evidence']}")
    return "\n".join(lines)
