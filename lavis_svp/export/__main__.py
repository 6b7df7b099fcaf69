"""``python -m lavis_svp.export merge ...``: one sub-command a file, each with an ``add_command``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lavis_svp import launch
from lavis_svp.export import consolidate, merge, shipped

COMMANDS = (merge, consolidate, shipped)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run the sub-command."""
    parser = argparse.ArgumentParser(prog="python -m lavis_svp.export", description="Get weights out of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        module.add_command(commands)
    args = parser.parse_args(arguments)
    launch.configure(lambda: args.run(args))


if __name__ == "__main__":
    main()
