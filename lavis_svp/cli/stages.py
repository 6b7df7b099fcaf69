"""``lavis-svp stages``: train in stages, each from the weights of the stage before it.

Each stage is a training run of its own, in processes of its own, whose ``model.pretrained`` is the output of the stage
before it, unless its YAML or the options name other weights. The same command, given again, goes on where it stopped:
a finished stage is not run again, an interrupted one resumes. An error ends the chain.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_svp.cli.common import command_parser, user_errors
from lavis_svp.cli.launcher import MODULE, run_child

DEFAULT_LAUNCH = shlex.join([sys.executable, "-m", MODULE, "train"])


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = command_parser(
        "stages",
        "Train in stages, each from the weights of the one before. Other arguments, such as --nproc 8, go to the\n"
        "command that trains a stage. The same command, given again, goes on where it stopped.",
        "lavis-svp stages --stages one.yaml two.yaml --nproc 8\n"
        '  lavis-svp stages --stages one.yaml two.yaml --launch "deepspeed --hostfile HOSTS --module lavis_svp.train"',
    )
    parser.add_argument("--stages", nargs="+", required=True, metavar="YAML", help="project YAMLs, in order")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all stages")
    parser.add_argument("--output-root", type=Path, metavar="DIR", help="stage NAME.yaml writes to DIR/NAME")
    parser.add_argument(
        "--launch", default=DEFAULT_LAUNCH, metavar="COMMAND", help="trains one stage (default: lavis-svp train)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check all stages, then run those that are not finished.

    Args:
        argv: the words after the command; None reads the process's own.
    """
    args, others = build_parser().parse_known_args(argv)
    with user_errors():
        stages = plan_stages(args.stages, args.options, args.output_root)
    run_stages(stages, [*shlex.split(args.launch), *others])


@dataclass(frozen=True)
class Stage:
    """One training run of a chain.

    Args:
        yaml: its project YAML.
        options: ``key=value`` laid over it.
        output_dir: where its checkpoints go.
        max_iters: optimizer steps of it.
        splits: evaluated at its end.
    """

    yaml: Path
    options: tuple[str, ...]
    output_dir: Path
    max_iters: int
    splits: tuple[str, ...]

    @property
    def weights(self) -> Path:
        """The checkpoint that it ends with."""
        return self.output_dir / f"checkpoint_{self.max_iters}.pth"

    @property
    def finished(self) -> bool:
        """Whether its last checkpoint and the results of all evaluations at its end are there."""
        from lavis_svp.runners.resume import ResultStore

        results = ResultStore(self.output_dir / "result")
        return self.weights.exists() and all(results.path(split, self.max_iters).is_file() for split in self.splits)


def plan_stages(yamls: Sequence[str | Path], options: Sequence[str], output_root: Path | None = None) -> list[Stage]:
    """Read and check the YAMLs of all stages, before the first one runs.

    Args:
        yamls: project YAMLs, in order.
        options: for all of them, as ``--options``.
        output_root: each stage writes to the folder of its YAML's name below this one; None = as the YAMLs say.

    Raises:
        FileNotFoundError: no such YAML.
        ValueError: a stage that cannot be chained: it writes where another one does, does not train, or says itself
            which checkpoint it resumes.
        KeyError: an unknown model, data set, task or runner.
    """
    from lavis_svp.runners.project import dot_list, read_project

    stages: list[Stage] = []
    for yaml in map(Path, yamls):
        words = dot_list(options)
        if output_root is not None:
            words.append(f"run.output_dir={output_root / yaml.stem}")
        project = read_project(yaml, words)
        if stages and not project.model.get("pretrained"):
            words += ["model.load_pretrained=True", f"model.pretrained={stages[-1].output_dir}"]
            project = read_project(yaml, words)
        run = _checked(project, yaml)
        stage = Stage(yaml, tuple(words), Path(run.output_dir), int(run.max_iters), _splits(run))
        twin = next((other for other in stages if other.output_dir == stage.output_dir), None)
        if twin is not None:
            raise ValueError(
                f"{twin.yaml} and {yaml} both write to {stage.output_dir}: give each a run.output_dir of its own, or "
                "use --output-root."
            )
        stages.append(stage)
    return stages


def run_stages(stages: Sequence[Stage], command: Sequence[str]) -> None:
    """Run the stages that are not finished, one after the other.

    Args:
        stages: the result of :func:`plan_stages`.
        command: trains one stage when ``--cfg-path`` and ``--options`` are added.

    Raises:
        SystemExit: a stage failed (with its exit code), or ended without its last checkpoint.
    """
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}: {stage.yaml}"
        if stage.finished:
            print(f"{title} is finished: {stage.weights}", flush=True)
            continue
        print(f"{title} trains until {stage.weights}", flush=True)
        options = ["--options", *stage.options] if stage.options else []
        code = run_child([*command, "--cfg-path", str(stage.yaml), *options])
        if code:
            print(f"error: {title} ended with code {code}; run the same command to go on.", file=sys.stderr)
            raise SystemExit(code if code > 0 else 128 - code)
        if not stage.weights.exists():
            print(f"error: {title} ended well but left no {stage.weights}.", file=sys.stderr)
            raise SystemExit(1)


def _checked(project: Any, yaml: Path) -> Any:
    """The complete run section of a stage's project."""
    from lavis_svp.models.config import parse_model_options
    from lavis_svp.runners.project import build_config

    config = build_config(project)
    run = config.run_cfg
    if run.evaluate or run.max_iters < 1:
        raise ValueError(f"{yaml} does not train (run.evaluate {run.evaluate}, run.max_iters {run.max_iters}).")
    if run.resume != "auto" or run.get("resume_ckpt_path"):
        raise ValueError(f"{yaml} sets run.resume; in a chain it must be auto, so that the chain can be interrupted.")
    if config.model_cfg.arch == "svp_ris":
        parse_model_options(config.model_cfg)
    return run


def _splits(run: Any) -> tuple[str, ...]:
    """The splits whose results at the last step mark a run as finished."""
    return (*run.valid_splits, *(run.test_splits if run.test_checkpoint == "last" else ()))


if __name__ == "__main__":
    main()
