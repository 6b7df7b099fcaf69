"""``lavis-svp metrics``: print the tables of finished evaluations again, from their files of records."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lavis_svp.cli.common import command_parser, user_errors


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp metrics``."""
    parser = command_parser(
        "metrics",
        "Summarise files of records, each by itself. Needs neither LAVIS nor torch.",
        "lavis-svp metrics output/svp/refshapes_tiny/result/test_*.jsonl",
    )
    parser.add_argument("files", nargs="+", metavar="JSONL", help="written by an evaluation, one record per line")
    parser.add_argument("--json", action="store_true", help="print the whole summary as JSON instead of a table")
    resamples = "resamples of the bootstrap intervals (default: %(default)s)"
    parser.add_argument("--resamples", type=int, default=1000, help=resamples)
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` are the words after it."""
    args = build_parser().parse_args(argv)
    from lavis_svp.metrics import Bootstrap, format_summary, summary
    from lavis_svp.metrics.records import read_records

    with user_errors():
        bootstrap = Bootstrap(resamples=args.resamples, seed=args.seed)
        results = {}
        for path in args.files:
            records = read_records(path)
            try:
                results[path] = summary(records, bootstrap)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    if args.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    else:
        print("\n\n".join(format_summary(result, path) for path, result in results.items()))
    return 0
