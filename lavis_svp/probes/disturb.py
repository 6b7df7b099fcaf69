"""Destructive tests: SSPE's outputs, or the visual tokens, are replaced while the model runs, and scores compared.

The replacement is a forward hook that exists only inside :func:`disturbed`; no weight and no method changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavis_svp.common.registry import unknown_name
from lavis_svp.metrics.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap, cluster_sums, ratio_interval
from lavis_svp.metrics.records import Record
from lavis_svp.metrics.report import summary
from lavis_svp.metrics.scores import image_of, ious
from lavis_svp.projectors.types import VisualTokens

RECEIVERS = {
    "sspe": ("sspe_to_vision", "sspe_to_llm"),
    "sspe_ssa": ("sspe_to_vision",),
    "sspe_tokens": ("sspe_to_llm",),
}
"""Target -> output heads of SSPE in ``svp``: both, the one to SSA, the one to the tokens."""
TOKENS = "tokens"
TARGETS = (*RECEIVERS, TOKENS)
MODES = ("average", "shuffle", "swap", "zero", "reorder")


@dataclass(frozen=True)
class Disturbance:
    """A replacement of SSPE's outputs or of the visual tokens.

    Args:
        target: "sspe" (SSPE to SSA and to the tokens), "sspe_ssa", "sspe_tokens", or "tokens", the visual tokens
            themselves, as a control.
        mode: "average": the mean over the training superpixels. "shuffle": vectors permuted among the superpixels of
            the image, which keep their regions. "swap": vectors of a training image. "zero": zeros. "reorder", of
            "tokens" only: permuted together with their regions, which should change nothing but the order.
        seed: of permutations and of the choice of other images.

    Raises:
        UnknownNameError: an unknown target or mode.
        ValueError: the mode is "reorder" and the target is not "tokens".
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
            raise ValueError(f"Mode 'reorder' is for '{TOKENS}' only, not for '{self.target}'.")

    @property
    def random(self) -> bool:
        """Whether the seed matters."""
        return self.mode in ("shuffle", "swap", "reorder")


@dataclass
class Bank:
    """Vectors of training images: for each source of vectors, one (S_b, W) tensor per image.

    Sources are the names of SSPE's output heads and "tokens".
    """

    images: dict[str, list[Tensor]]

    def __len__(self) -> int:
        return len(self.images[TOKENS])

    def mean(self, source: str) -> Tensor:
        """(W,) mean over all superpixels of all images."""
        rows = torch.cat(self.images[source])
        return rows.cpu().double().mean(0).float().to(rows)  # Apple's GPUs have no float64


def targets_of(projector: nn.Module) -> list[str]:
    """The targets that a projector has: each output head of SSPE, both together if there are both, and the tokens."""
    names = [name for name in RECEIVERS if all(getattr(projector, head, None) is not None for head in RECEIVERS[name])]
    return [*names, TOKENS]


def _heads_of(projector: nn.Module, target: str) -> dict[str, nn.Module]:
    """The output heads of SSPE that belong to a target, as far as the projector has them."""
    found = {name: getattr(projector, name, None) for name in RECEIVERS[target]}
    return {name: head for name, head in found.items() if isinstance(head, nn.Module)}


@torch.no_grad()
def collect(projector: nn.Module, run: Iterator[Any]) -> Bank:
    """Record the outputs of SSPE's heads and of the projector during ``run``.

    Args:
        projector: of the model.
        run: an iterator whose every step runs the projector on a batch, such as ``(model.encode(b) for b in batches)``.

    Raises:
        ValueError: ``run`` has no step.
    """
    heads = _heads_of(projector, "sspe")
    seen: dict[str, Tensor] = {}
    images: dict[str, list[Tensor]] = {name: [] for name in (*heads, TOKENS)}

    def record_tokens(output: VisualTokens) -> None:
        seen[TOKENS] = output.tokens
        for name, rows in seen.items():
            images[name] += [row[: int(n)].detach().clone() for row, n in zip(rows, output.valid.sum(1), strict=True)]

    with ExitStack() as stack:
        for name, head in heads.items():
            _hook(stack, head, partial(seen.__setitem__, name))
        _hook(stack, projector, record_tokens)
        for _ in run:
            pass
    if not images[TOKENS]:
        raise ValueError("There are no training images that could give means and other images' vectors.")
    return Bank(images)


@contextmanager
def disturbed(projector: nn.Module, disturbance: Disturbance, bank: Bank) -> Iterator[None]:
    """Run the projector under a disturbance inside the ``with`` block.

    Random choices are drawn image by image, so that results depend on the seed and the order of the images, but not
    on the batch size. All heads of SSPE share the same permutation and the same other image.

    Args:
        projector: of the model.
        disturbance: the replacement.
        bank: of the same projector.

    Raises:
        ValueError: the projector has no SSPE.
    """
    replacement = _Replacement(disturbance, bank)
    with ExitStack() as stack:
        if disturbance.target == TOKENS:
            _hook(stack, projector, replacement.tokens)
        else:
            heads = _heads_of(projector, disturbance.target)
            if not heads:
                raise ValueError(f"This projector has no SSPE for '{disturbance.target}'; disturb '{TOKENS}' instead.")
            for name, head in heads.items():
                _hook(stack, head, partial(replacement.rows, name))
            # SvpRis calls the projector with features and superpixels.
            draw = projector.register_forward_pre_hook(lambda _, inputs: replacement.draw(inputs[1].valid))
            stack.callback(draw.remove)
        yield


def _hook(stack: ExitStack, module: nn.Module, function: Callable[[Any], Any]) -> None:
    """Call a function with each output of a module, until the stack is left; it may return another output."""
    stack.callback(module.register_forward_hook(lambda _, __, output: function(output)).remove)


class _Replacement:
    """Replaces the vectors of one batch at a time, by random choices that :meth:`draw` makes for it."""

    def __init__(self, disturbance: Disturbance, bank: Bank) -> None:
        self.mode, self.bank = disturbance.mode, bank
        self.rng = np.random.default_rng(disturbance.seed)
        self.choices: list[tuple[int, int, np.ndarray]] = []  # of each image: count, other image, order

    def draw(self, valid: Tensor) -> None:
        """Draw for a batch whose vectors are ``valid`` (B, S)."""
        images, self.choices = self.bank.images[TOKENS], []
        for count in valid.sum(1).clamp(min=1).tolist():  # an image without superpixels has one token, too
            other = int(self.rng.integers(len(images)))
            order = self.rng.permutation(len(images[other]) if self.mode == "swap" else count)
            self.choices.append((count, other, order))

    def rows(self, source: str, output: Tensor) -> Tensor:
        """Replace the vectors (B, S, W) of one source; padding stays."""
        result = output.clone()
        for row, own, (count, other, order) in zip(result, output, self.choices, strict=True):
            if self.mode == "zero":
                row[:count] = 0
            elif self.mode == "average":
                row[:count] = self.bank.mean(source).to(own)
            elif self.mode == "swap":  # the order starts over if the other image has fewer vectors
                row[:count] = self.bank.images[source][other][order[np.arange(count) % len(order)]].to(own)
            else:
                row[:count] = own[order]
        return result

    def tokens(self, visual: VisualTokens) -> VisualTokens:
        """Replace the visual tokens; their regions stay, except for "reorder"."""
        self.draw(visual.valid)
        moved: dict[str, Any] = {"tokens": visual.tokens}
        if self.mode == "reorder":
            moved |= {"assignment": visual.assignment, "order": visual.order}
        changed: dict[str, Any] = {name: self.rows(TOKENS, one) for name, one in moved.items() if one is not None}
        return replace(visual, **changed)


GROUPED = ("giou", "giou_ci", "pick_accuracy", "n", "n_images")


def paired_difference(
    before: Sequence[Record], after: Sequence[Record], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Any]:
    """The difference in gIoU over the expressions with a target, with intervals that resample images.

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
        raise ValueError(
            f"The two evaluations ({len(before)} and {len(after)} records) are not of the same expressions."
        )

    def difference(rows: Sequence[Record]) -> dict[str, Any]:
        change = ious(other[record["expression_id"]] for record in rows) - ious(rows)
        images, kinds = [image_of(record) for record in rows], [record["kind"] for record in rows]
        sums, counts = (cluster_sums(values, images, kinds) for values in (change, np.ones(len(rows))))
        point = float((sums.sum(0) / counts.sum(0)).mean())
        return {"difference": point, "ci": ratio_interval(sums, counts, bootstrap)}

    targets = [record for record in before if record["has_target"]]
    groups: dict[str, list[Record]] = {"macro": targets}
    for kind in sorted({record["kind"] for record in targets}):
        groups[kind] = [record for record in targets if record["kind"] == kind]
    return {name: difference(rows) for name, rows in groups.items()}


def disturbances(
    projector: Any, seeds: Sequence[int], targets: Sequence[str] | None = None, modes: Sequence[str] | None = None
) -> list[Disturbance]:
    """List the disturbances that a projector allows; random ones once for each seed.

    Args:
        projector: the model's.
        seeds: of the random ones.
        targets: None = all that the projector has.
        modes: None = all.

    Raises:
        UnknownNameError: an unknown target or mode.
        ValueError: the projector does not have a target.
    """
    own = targets_of(projector)
    cases = []
    for target in targets or own:
        for mode in modes or MODES:
            if mode == "reorder" and target in RECEIVERS:
                continue
            one = Disturbance(target, mode)
            cases += [replace(one, seed=seed) for seed in seeds] if one.random else [one]
    missing = [target for target in targets or () if target not in own]
    if missing:
        raise ValueError(f"This projector has no {', '.join(missing)} to disturb, only: {', '.join(own)}.")
    return cases


def compare(
    projector: Any,
    bank: Bank,
    cases: Sequence[Disturbance],
    score: Callable[[str], list[Record]],
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> dict[str, Any]:
    """Score the model undisturbed and under each disturbance.

    Args:
        projector: the model's.
        bank: of the same projector.
        cases: the disturbances.
        score: evaluates the split; it is called with a title for its progress bar.
        bootstrap: of the intervals.

    Returns:
        "undisturbed": scores; "cases": one entry per disturbance with its scores and "against_undisturbed".
    """
    before = score("undisturbed")
    rows = []
    for case in cases:
        with disturbed(projector, case, bank):
            after = score(f"{case.target}, {case.mode}, seed {case.seed}")
        row = {"target": case.target, "mode": case.mode, "seed": case.seed if case.random else None}
        row |= scores(after, bootstrap)
        rows.append({**row, "against_undisturbed": paired_difference(before, after, bootstrap)})
    return {"undisturbed": scores(before, bootstrap), "cases": rows}


def scores(records: Sequence[Record], bootstrap: Bootstrap) -> dict[str, Any]:
    """The headline and, by kind, gIoU with its interval and pick accuracy, from the evaluation's own summary."""
    whole = summary(records, bootstrap)
    head = {key: whole["headline"][key] for key in ("giou_macro", "giou_macro_ci", "pick_accuracy_macro", "n")}
    return {"headline": head, "by_kind": {k: {key: one[key] for key in GROUPED} for k, one in whole["by_kind"].items()}}


def format_comparison(result: dict[str, Any]) -> str:
    """Format gIoU and pick accuracy of every case, and the change of gIoU with its interval."""
    kinds = list(result["undisturbed"]["by_kind"])
    lines = [f"{'disturbed':30}{'gIoU':>7}{'pick':>7}  " + "".join(f"{kind:>13}" for kind in kinds) + "  change (95 %)"]
    for row in (result["undisturbed"], *result["cases"]):
        name = f"{row['target']}: {row['mode']}" if "target" in row else "nothing"
        name += f" (seed {row['seed']})" if row.get("seed") is not None else ""
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
