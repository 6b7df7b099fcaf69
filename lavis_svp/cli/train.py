"""``lavis-svp train``: train a model as a project YAML says, then evaluate it; or several YAMLs in turn, as stages.

Each stage is a training run of its own, in processes of its own, whose ``model.pretrained`` is the output of the stage
before it, unless its YAML or the options name other weights. The same command, given again, goes on where it stopped:
a finished stage is not run again, an interrupted one resumes. An error ends the chain. ``lavis-svp stages`` is the same
with any command that trains one stage.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lavis_svp.cli.common import add_project_options, command_parser, process_group, user_errors
from lavis_svp.cli.launcher import MODULE, add_launch_options, run_child, run_in_processes

DEFAULT_LAUNCH = shlex.join([sys.executable, "-m", MODULE, "train"])


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of ``lavis-svp train``."""
    parser = command_parser(
        "train",
        "Train a model as a LAVIS project YAML says, then evaluate it. The same command, given again after an\n"
        "interruption, goes on where it stopped.",
        "lavis-svp train --cfg-path projects/svp/train/refshapes_tiny.yaml --options run.seed=43\n"
        "  lavis-svp train --nproc 8 --stages projects/svp/train/stage1_vicuna7b.yaml "
        "projects/svp/train/stage2_vicuna7b.yaml",
    )
    paths = parser.add_mutually_exclusive_group(required=True)
    text = "project YAMLs to train in turn, each from the weights of the one before"
    paths.add_argument("--stages", nargs="+", metavar="YAML", help=text)
    add_project_options(parser, paths=paths)
    add_launch_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train in this process, in several, or in stages; ``argv`` are the words after the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = {word.partition("=")[0] for word in words}
    if "--stages" in flags and not flags & {"-h", "--help", "--cfg-path"}:
        stages(words)
        return
    args = build_parser().parse_args(words)
    with user_errors():
        run_in_processes("train", words, args)
        from lavis_svp.runners.project import SETUP_ERRORS, build_config, build_runner, read_project

        config = build_config(read_project(args.cfg_path, args.options))
    with process_group(), user_errors(SETUP_ERRORS):
        runner = build_runner(config)
        runner.train()


# --------------------------------------------------------------------------------------------------------- stages


def build_stages_parser() -> argparse.ArgumentParser:
    """Build the parser of ``lavis-svp stages``."""
    parser = command_parser(
        "stages",
        "Train in stages, each from the weights of the one before. Other arguments, such as --nproc 8, go to the\n"
        "command that trains a stage. The same command, given again, goes on where it stopped.",
        "lavis-svp stages --stages one.yaml two.yaml --nproc 8\n"
        "  lavis-svp stages --stages one.yaml two.yaml "
        '--launch "deepspeed --hostfile HOSTS --no_local_rank --module lavis_svp.cli train"',
    )
    parser.add_argument("--stages", nargs="+", required=True, metavar="YAML", help="project YAMLs, in order")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all stages")
    parser.add_argument("--output-root", type=Path, metavar="DIR", help="stage NAME.yaml writes to DIR/NAME")
    text = "trains one stage (default: lavis-svp train)"
    parser.add_argument("--launch", default=DEFAULT_LAUNCH, metavar="COMMAND", help=text)
    return parser


def stages(argv: Sequence[str] | None = None) -> None:
    """Check all stages, then run those that are not finished; ``argv`` are the words after the command."""
    args, others = build_stages_parser().parse_known_args(argv)
    with user_errors():
        planned = plan_stages(args.stages, args.options, args.output_root)
    run_stages(planned, [*shlex.split(args.launch), *others])


@dataclass(frozen=True)
class Stage:
    """One training run of a chain."""

    yaml: Path
    options: tuple[str, ...]  # key=value, laid over the YAML
    output_dir: Path
    max_iters: int
    splits: tuple[str, ...]  # whose results at the last step mark the stage as finished

    @property
    def weights(self) -> Path:
        """The checkpoint that it ends with."""
        return self.output_dir / f"checkpoint_{self.max_iters}.pth"

    @property
    def finished(self) -> bool:
        """Whether its last checkpoint and the results of all evaluations at its end are there."""
        from lavis_svp.metrics.records import read_metrics
        from lavis_svp.runners.resume import ResultStore

        results = ResultStore(self.output_dir / "result")
        files = [results.path(split, self.max_iters) for split in self.splits]
        return self.weights.is_file() and all(read_metrics(file) is not None for file in files)


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
    from lavis_svp.runners.project import build_config, dot_list, read_project

    planned: list[Stage] = []
    for yaml in map(Path, yamls):
        words = dot_list(options)
        if output_root is not None:
            words.append(f"run.output_dir={output_root / yaml.stem}")
        project = read_project(yaml, words)
        if planned and not project.model.get("pretrained"):
            words += ["model.load_pretrained=True", f"model.pretrained={planned[-1].output_dir}"]
            project = read_project(yaml, words)
        run = build_config(project).run_cfg
        if run.evaluate or run.max_iters < 1:
            raise ValueError(f"{yaml} does not train (run.evaluate {run.evaluate}, run.max_iters {run.max_iters}).")
        if run.resume != "auto" or run.get("resume_ckpt_path"):
            raise ValueError(f"{yaml} sets run.resume; it must be auto in a chain, so that this can be interrupted.")
        splits = (*run.valid_splits, *(run.test_splits if run.test_checkpoint == "last" else ()))
        stage = Stage(yaml, tuple(words), Path(run.output_dir), int(run.max_iters), splits)
        for other in planned:
            if other.output_dir == stage.output_dir:
                raise ValueError(
                    f"{other.yaml} and {yaml} both write to {stage.output_dir}: give each a run.output_dir of its own, "
                    "or use --output-root."
                )
        planned.append(stage)
    return planned


def run_stages(planned: Sequence[Stage], command: Sequence[str]) -> None:
    """Run the stages that are not finished, one after the other.

    Args:
        planned: the result of :func:`plan_stages`.
        command: trains one stage when ``--cfg-path`` and ``--options`` are added.

    Raises:
        SystemExit: a stage failed (with its exit code), or ended without its last checkpoint.
    """
    for number, stage in enumerate(planned, start=1):
        title = f"stage {number} of {len(planned)}: {stage.yaml}"
        if stage.finished:
            print(f"{title} is finished: {stage.weights}", flush=True)
            continue
        print(f"Training {title}; it ends with {stage.weights}", flush=True)
        options = ["--options", *stage.options] if stage.options else []
        run_child([*command, "--cfg-path", str(stage.yaml), *options], title)
        if not stage.weights.exists():
            print(f"error: {title} ended without an error but wrote no {stage.weights}.", file=sys.stderr)
            raise SystemExit(1)
