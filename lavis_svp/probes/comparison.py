"""Two evaluations of the same expressions, compared pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap, cluster_sums, ratio_interval
from lavis_svp.metrics.records import Record
from lavis_svp.metrics.report import summary
from lavis_svp.metrics.scores import image_of, ious
from lavis_svp.probes.disturb import MODES, TOKENS, Bank, Disturbance, disturbed, targets_of

GROUPED = ("giou", "giou_ci", "pick_accuracy", "n", "n_images")


def paired_difference(
    before: Sequence[Record], after: Sequence[Record], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Any]:
    """The change of gIoU over the expressions with a target, with intervals that resample images.

    Args:
        before: records of one evaluation.
        after: records of the same expressions in the other.
        bootstrap: of the intervals.

    Returns:
        {"macro" (mean over kinds) and each kind: {"difference", "ci"}}.

    Raises:
        ValueError: the expressions differ.
    """
    other = {record["expression_id"]: record for record in after}
    if set(other) != {record["expression_id"] for record in before} or len(before) != len(after):
        raise ValueError(f"Records of {len(before)} and {len(after)} expressions are not of the same expressions.")
    pairs = [(record, other[record["expression_id"]]) for record in before if record["has_target"]]
    kinds = sorted({record["kind"] for record, _ in pairs})
    result = {kind: _difference([pair for pair in pairs if pair[0]["kind"] == kind], bootstrap) for kind in kinds}
    return {"macro": _difference(pairs, bootstrap), **result}


def _difference(pairs: Sequence[tuple[Record, Record]], bootstrap: Bootstrap) -> dict[str, Any]:
    change = ious(after for _, after in pairs) - ious(before for before, _ in pairs)
    images, kinds = [image_of(one) for one, _ in pairs], [one["kind"] for one, _ in pairs]
    sums = cluster_sums(change, images, kinds)
    counts = cluster_sums(np.ones(len(pairs)), images, kinds)
    point = float((sums.sum(0) / counts.sum(0)).mean())
    return {"difference": point, "ci": ratio_interval(sums, counts, bootstrap)}


def disturbances(
    projector: Any, seeds: Sequence[int], targets: Sequence[str] | None = None, modes: Sequence[str] | None = None
) -> list[Disturbance]:
    """The disturbances that a projector allows; those that draw, once a seed.

    Args:
        projector: the model's.
        seeds: of those that draw.
        targets: only these; None = all that the projector has.
        modes: only these; None = all.

    Raises:
        UnknownNameError: an unknown target or mode.
        ValueError: a target that the projector has not.
    """
    own = targets_of(projector)
    for mode in modes or ():
        Disturbance(TOKENS, mode)
    for target in targets or ():
        if Disturbance(target, "zero").target not in own:
            raise ValueError(f"This projector has no '{target}' to disturb, only: {', '.join(own)}.")
    found = []
    for target in targets or own:
        for mode in modes or MODES:
            if mode == "reorder" and target != TOKENS:
                continue
            one = Disturbance(target, mode)
            found += [Disturbance(target, mode, seed) for seed in seeds] if one.random else [one]
    return found


def compare(
    projector: Any,
    bank: Bank,
    cases: Sequence[Disturbance],
    score: Callable[[str], list[Record]],
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> dict[str, Any]:
    """Score the model as it is and under each disturbance.

    Args:
        projector: the model's.
        bank: of the same projector.
        cases: what to try.
        score: evaluates the split; called with a name for its progress.
        bootstrap: of the intervals.

    Returns:
        "undisturbed": scores; "cases": one entry a disturbance with its scores and "against_undisturbed".
    """
    before = score("undisturbed")
    rows = []
    for case in cases:
        with disturbed(projector, case, bank):
            after = score(f"{case.target}, {case.mode}, seed {case.seed}")
        rows.append(
            {
                "target": case.target,
                "mode": case.mode,
                "seed": case.seed if case.random else None,
                **scores(after, bootstrap),
                "against_undisturbed": paired_difference(before, after, bootstrap),
            }
        )
    return {"undisturbed": scores(before, bootstrap), "cases": rows}


def scores(records: Sequence[Record], bootstrap: Bootstrap) -> dict[str, Any]:
    """The headline and, by kind, gIoU with its interval and pick accuracy, out of the evaluation's own summary."""
    whole = summary(records, bootstrap)
    head = {key: whole["headline"][key] for key in ("giou_macro", "giou_macro_ci", "pick_accuracy_macro", "n")}
    return {"headline": head, "by_kind": {k: {key: one[key] for key in GROUPED} for k, one in whole["by_kind"].items()}}


def format_comparison(result: dict[str, Any]) -> str:
    """As text: gIoU and pick accuracy, then the change of gIoU with its interval."""
    kinds = list(result["undisturbed"]["by_kind"])
    lines = [f"{'disturbed':30}{'gIoU':>7}{'pick':>7}  " + "".join(f"{kind:>13}" for kind in kinds) + "  change (95 %)"]
    for name, row in _named(result):
        head = row["headline"]
        pick = head["pick_accuracy_macro"]
        line = f"{name:30}{head['giou_macro']:>7.3f}{'–' if pick is None else f'{pick:.3f}':>7}  "
        line += "".join(f"{row['by_kind'][kind]['giou']:>13.3f}" for kind in kinds)
        if "against_undisturbed" in row:
            macro = row["against_undisturbed"]["macro"]
            low, high = macro["ci"] or (float("nan"),) * 2
            line += f"  {macro['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(line)
    return "\n".join(lines)


def _named(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "nothing", result["undisturbed"]
    for row in result["cases"]:
        seed = "" if row["seed"] is None else f" (seed {row['seed']})"
        yield f"{row['target']}: {row['mode']}{seed}", row
