"""The ``run.eval`` section of a project YAML."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_svp.common.registry import unknown_name
from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.metrics.records import MODES

EVAL_MODES = (*MODES, "both")


@dataclass(frozen=True)
class EvalOptions:
    """How a split is evaluated; which sentences count (the protocol) is a setting of the data set.

    Args:
        mode: ``generative`` (the model writes its answer; no ``[SEG]``, no mask), ``teacher_forced`` (the answer with
            ``[SEG]`` is given) or ``both``, which takes twice as long and reports them side by side.
        num_visualise: how many expressions to draw, spread over the kinds; 0 = none.
        bootstrap: of the confidence intervals: ``resamples``, ``seed``, ``level``.
    """

    mode: str = "generative"
    num_visualise: int = 12
    bootstrap: Bootstrap = Bootstrap()

    def __post_init__(self) -> None:
        if self.mode not in EVAL_MODES:
            raise unknown_name("evaluation mode (run.eval.mode)", self.mode, EVAL_MODES)
        if isinstance(self.num_visualise, bool) or not isinstance(self.num_visualise, int) or self.num_visualise < 0:
            raise ValueError(f"run.eval.num_visualise must be a number from 0 up, got {self.num_visualise!r}.")

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes to run, the one that the headline counts first."""
        return MODES if self.mode == "both" else (self.mode,)
