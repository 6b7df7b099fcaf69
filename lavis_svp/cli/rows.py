"""``lavis-svp ablation`` and ``lavis-svp compare``: train the YAMLs of a folder, the rows of a table, in turn."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lavis_svp.cli.common import command_parser, user_errors
from lavis_svp.cli.launcher import MODULE, add_launch_options, launch_words, run_child
from lavis_svp.metrics.records import read_metrics

CLONE = Path(__file__).resolve().parents[2]
FOLDERS = {"ablation": "projects/svp/ablation", "compare": "projects/svp/comparison"}
STEP_TIMES = "benchmarks/step_times.py"
METRICS = ("giou_macro", "ciou_macro", "pick_accuracy_macro")


def build_parser(command: str = "ablation") -> argparse.ArgumentParser:
    """Build the parser of ``ablation`` or ``compare``."""
    subject = {"ablation": "ablation of SVP", "compare": "comparison of projectors"}[command]
    parser = command_parser(
        command,
        f"Train and evaluate the {subject}, one row after another, and print a table of the test scores. A row\n"
        "that has its result is left out, an interrupted one goes on: the same command, given again, continues. A row\n"
        "that fails ends the command.",
        f'lavis-svp {command} --seeds "42 43" --options run.max_iters=300',
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"names of YAMLs of {FOLDERS[command]}/ (default: all)")
    parser.add_argument("--seeds", default="", help='seeds, such as "42 43" (default: each YAML\'s own)')
    parser.add_argument("--into", default="", metavar="NAME", help="a folder that keeps runs with other options apart")
    parser.add_argument("--folder", type=Path, help=f"where the YAMLs are (default: {FOLDERS[command]} of the clone)")
    if command == "compare":
        text = "steps: as many as each YAML says; time: as many as take the time of the row `svp`, by the step times "
        text += "measured side by side in the repository (default: steps)"
        parser.add_argument("--budget", choices=("steps", "time"), default="steps", help=text)
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all rows")
    add_launch_options(parser)
    return parser


def main(argv: Sequence[str] | None = None, command: str = "ablation") -> None:
    """Train the rows that have no result yet, then print the scores of all of them; ``argv`` follow the command."""
    args = build_parser(command).parse_args(argv)
    with user_errors():
        budget = getattr(args, "budget", "")
        runs = plan_rows(args, Path(FOLDERS[command]).name, f"_{budget}" if budget else "")
    for output, yaml, options in runs:
        if result_of(output) is not None:
            print(f"{output} has its result.", flush=True)
            continue
        print(output, flush=True)
        if budget == "time":
            options = [*options[:1], _equal_time(yaml.stem), *options[1:]]
        words = [sys.executable, "-m", MODULE, "train", "--cfg-path", str(yaml)]
        run_child([*words, *launch_words(args), "--options", *options], str(output))
    print(score_table([output for output, *_ in runs]))


def plan_rows(args: argparse.Namespace, kind: str, suffix: str) -> list[tuple[Path, Path, list[str]]]:
    """Check the arguments and list the runs: (output folder, YAML, options) of each.

    Args:
        args: the parsed command line.
        kind: folder of the outputs, below ``output/svp/``.
        suffix: of each output's name.
    """
    folder = args.folder or CLONE / "projects/svp" / kind
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if not known:
        raise FileNotFoundError(f"There are no YAMLs in {folder}; name their folder by --folder.")
    unknown = [row for row in args.rows if row not in known]
    if unknown:
        raise ValueError(f"There is no row '{unknown[0]}'. Rows: {', '.join(known)}.")
    if not re.fullmatch(r"\w*", args.into, re.ASCII):
        raise ValueError(f"--into takes letters, digits and _, got '{args.into}'.")
    if any(option.startswith(("run.output_dir=", "run.seed=")) for option in args.options):
        raise ValueError("Each row has an output_dir of its own, and --seeds chooses the seeds.")
    bad = [seed for seed in args.seeds.split() if not seed.isdecimal()]
    if bad:
        raise ValueError(f"--seeds must be whole numbers, got '{bad[0]}'.")
    runs = []
    for row in args.rows or known:
        for seed in args.seeds.split() or [None]:
            output = Path("output/svp", kind, args.into, row + suffix + (f"_seed{seed}" if seed else ""))
            options = [f"run.output_dir={output}", *([f"run.seed={seed}"] if seed else []), *args.options]
            runs.append((output, folder / f"{row}.yaml", options))
    return runs


def result_of(output: Path) -> dict[str, float] | None:
    """Read the metrics of a run's last test; None if there are none yet, or the file is torn."""
    files = [path for path in (output / "result").glob("metrics_test_*.json") if _steps(path).isdecimal()]
    return read_metrics(max(files, key=lambda path: int(_steps(path)))) if files else None


def _steps(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def score_table(outputs: Sequence[Path]) -> str:
    """Format the test scores of finished runs, one per line."""
    results = {output.name: result_of(output) or {} for output in outputs}
    columns = [name for name in METRICS if any(name in result for result in results.values())]
    width = max((len(name) for name in results), default=0)
    lines = [f"{'row':<{width}}" + "".join(f"{name:>13}" for name in columns)]
    for name, result in results.items():
        cells = "".join(f"{result[key]:>13.4f}" if key in result else f"{'-':>13}" for key in columns)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def _equal_time(row: str) -> str:
    """The option that gives a row as many steps as take the time of `svp`."""
    command = [sys.executable, str(CLONE / STEP_TIMES), "steps", row]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        print(f"error: {STEP_TIMES} has no step times for '{row}': {reason}", file=sys.stderr)
        raise SystemExit(2)
    return done.stdout.strip()


ablation, compare = partial(main, command="ablation"), partial(main, command="compare")
