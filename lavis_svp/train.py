"""Train a model: ``python -m lavis_svp.train --cfg-path project.yaml [--options run.max_iters=100 ...]``.

The same command, given again, goes on where it stopped. Several processes: ``python -m torch.distributed.run
--nproc_per_node=2 -m lavis_svp.train --cfg-path project.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence

from lavis_svp import launch


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the YAML says, then evaluate."""
    args = launch.build_parser("Train a model as a LAVIS project YAML says.").parse_args(arguments)
    config = launch.configure(lambda: launch.build_config(launch.read_project(args.cfg_path, args.options)))
    launch.run_command(lambda: launch.build_runner(config).train())


if __name__ == "__main__":
    main()
