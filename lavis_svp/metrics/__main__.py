"""Print the tables of finished evaluations again: ``python -m lavis_svp.metrics result/test_100.jsonl``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lavis_svp.metrics import Bootstrap, format_summary, summary
from lavis_svp.metrics.files import read_records

DEFAULTS = Bootstrap()


def main(arguments: Sequence[str] | None = None) -> None:
    """Summarise each file of records by itself.

    Args:
        arguments: of the command line; None = those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m lavis_svp.metrics", description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="JSONL", help="written by the task, one record a line")
    parser.add_argument("--json", action="store_true", help="print the whole summary as JSON instead of a table")
    parser.add_argument("--resamples", type=int, default=DEFAULTS.resamples, help="of the bootstrap (%(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of the bootstrap (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        bootstrap = Bootstrap(resamples=options.resamples, seed=options.seed)
        results = {path: summary(read_records(path), bootstrap) for path in options.files}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    else:
        print("\n\n".join(format_summary(result, path) for path, result in results.items()))


if __name__ == "__main__":
    main()
