"""What tells the model that there is no such thing, and the calibration of ``model.presence``.

Fitted on one split, judged on another. For each weight of the evidence, the bias is set such that of no kind of
expression with a target more than a chosen share is refused; the weight is the one that then refuses most of those
without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lavis_svp.models.presence import NoTargetOptions, weigh

ABSENT = "no_target"
WEIGHTS = (0.0, *(2.0 ** (step / 2) for step in range(-4, 13)))  # tried for the evidence; the first of equals is taken


@dataclass(frozen=True)
class Evidence:
    """What speaks for ``[SEG]`` in M expressions.

    Args:
        margin: (M,) by the language model.
        evidence: (M,) by the pointer.
        kinds: (M,) kind of each; ``no_target`` where there is no such thing.
    """

    margin: np.ndarray
    evidence: np.ndarray
    kinds: np.ndarray

    def score(self, options: NoTargetOptions) -> np.ndarray:
        """(M,) above 0 where ``[SEG]`` is written under a calibration."""
        return self.margin + options.bias + options.evidence * self.evidence

    @property
    def present_kinds(self) -> list[str]:
        """Kinds with a target."""
        return sorted(set(self.kinds.tolist()) - {ABSENT})


def gather_evidence(model: Any, batches: Iterable[Mapping[str, Any]]) -> Evidence:
    """Ask every expression of a split.

    Args:
        model: ``svp_ris`` in evaluation mode.
        batches: of the split, on the model's device.
    """
    margins, evidence, kinds = [], [], []
    for samples in batches:
        weighed = weigh(model, samples)
        margins += weighed.margin.tolist()
        evidence += weighed.evidence.tolist()
        places = zip(weighed.image.tolist(), weighed.expression.tolist(), strict=True)
        kinds += [samples["kinds"][image][number] for image, number in places]
    return Evidence(np.array(margins), np.array(evidence), np.array(kinds))


def fit_presence(found: Evidence, refused: float) -> NoTargetOptions:
    """Calibrate.

    Args:
        found: on images that the model was not trained on.
        refused: share of the expressions of a kind with a target that may be refused, to the nearest quantile: with
            few expressions it can be one of them more; in [0, 1).

    Raises:
        ValueError: a share outside of [0, 1), or expressions of one sort only.
    """
    if not 0 <= refused < 1:
        raise ValueError(f"The share of refused expressions must be in [0, 1), got {refused}.")
    present = found.kinds != ABSENT
    if present.all() or not present.any():
        raise ValueError(f"Calibration needs expressions with and without a target, got {sorted(set(found.kinds))}.")

    def calibrated(weight: float) -> NoTargetOptions:
        scores = found.score(NoTargetOptions(0.0, weight))
        lowest = min(float(np.quantile(scores[found.kinds == kind], refused)) for kind in found.present_kinds)
        return NoTargetOptions(-lowest, weight)

    return max(map(calibrated, WEIGHTS), key=lambda options: judge_presence(found, options)["n_acc"])


def judge_presence(found: Evidence, options: NoTargetOptions) -> dict[str, Any]:
    """Shares refused under a calibration, and how well the score tells the kinds apart.

    Returns:
        "n_acc" (share of ``no_target`` that is refused), "refused" by kind with a target, and "auc" by kind: chance
        that an expression of it scores above one without a target.
    """
    scores = found.score(options)
    absent = scores[found.kinds == ABSENT]
    by_kind = {kind: scores[found.kinds == kind] for kind in found.present_kinds}
    return {
        "n_acc": float((absent <= 0).mean()),
        "refused": {kind: float((values <= 0).mean()) for kind, values in by_kind.items()},
        "auc": {kind: area_under_curve(values, absent) for kind, values in by_kind.items()},
    }


def area_under_curve(above: np.ndarray, below: np.ndarray) -> float:
    """Chance that a draw of ``above`` exceeds one of ``below``, ties counting half."""
    difference = above[:, None] - below[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def absence_table(fitted_on: Evidence, judged_on: Evidence, refused: float) -> dict[str, Any]:
    """Fit on one split and judge on another: the language model alone, the pointer alone, and both.

    Args:
        fitted_on: see ``fit_presence``.
        judged_on: other images.
        refused: see ``fit_presence``.
    """
    chosen = fit_presence(fitted_on, refused)
    pointer = Evidence(np.zeros_like(judged_on.margin), judged_on.evidence, judged_on.kinds)
    alone = judge_presence(pointer, NoTargetOptions(0.0, 1.0))
    return {
        "presence": {"bias": round(chosen.bias, 3), "evidence": round(chosen.evidence, 3)},
        "refused_at_most": refused,
        "expressions": {"fitted": len(fitted_on.kinds), "judged": len(judged_on.kinds)},
        "language model alone": judge_presence(judged_on, NoTargetOptions()),
        "pointer alone": {"auc": alone["auc"]},
        "calibrated": judge_presence(judged_on, chosen),
    }


def format_absence(table: Mapping[str, Any]) -> str:
    """The table as text."""
    kinds = list(table["calibrated"]["auc"])
    lines = [
        f"{'':22}{'N-acc':>8}"
        + "".join(f"{'refused ' + k:>22}" for k in kinds)
        + "".join(f"{'AUC ' + k:>18}" for k in kinds)
    ]
    for name in ("language model alone", "pointer alone", "calibrated"):
        row = table[name]
        refused = row.get("refused", {})
        n_acc = f"{row['n_acc']:>8.3f}" if "n_acc" in row else f"{'':8}"
        cells = "".join(f"{refused[k]:>22.3f}" if k in refused else f"{'':22}" for k in kinds)
        lines.append(f"{name:22}{n_acc}{cells}" + "".join(f"{row['auc'][k]:>18.3f}" for k in kinds))
    chosen = table["presence"]
    lines.append(f"model.presence.bias={chosen['bias']} model.presence.evidence={chosen['evidence']}")
    return "\n".join(lines)
