"""Evaluate a model: ``python -m lavis_svp.evaluate --cfg-path project.yaml [--checkpoint file] [--options ...]``.

Weights: the checkpoint's for what was trained, the zoo's for what was frozen. Without ``--checkpoint``, the newest one
in ``run.output_dir``; if there is none, the model as its configuration loads it (``model.finetuned``; for ``svp_ris`` /
``tiny`` the shipped weights, unless the YAML says ``load_finetuned: False``), as in LAVIS.
With ``--checkpoint`` and no ``--cfg-path``, the configuration is the one stored in the checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_svp import launch


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate ``run.test_splits`` (or ``run.valid_splits``), whatever was evaluated before."""
    parser = launch.build_parser("Evaluate a model as a LAVIS project YAML says.", need_config=False)
    parser.add_argument("--checkpoint", help="a checkpoint, or a folder of which the newest is taken")
    args = parser.parse_args(arguments)
    if not args.cfg_path and not args.checkpoint:
        parser.error("give --cfg-path, --checkpoint, or both")
    checkpoint, config = launch.configure(lambda: read_command(args))
    launch.run_command(lambda: loaded_runner(config, checkpoint).evaluate(skip_reload=True))


def read_command(args: argparse.Namespace) -> tuple[Path | None, Any]:
    """Choose the checkpoint and make the configuration.

    Args:
        args: ``cfg_path`` (or None), ``checkpoint`` (or None), ``options``; not both of the first two are None.

    Returns:
        the checkpoint, None where the model is to be as its configuration loads it; and LAVIS's Config.

    Raises:
        FileNotFoundError: no such checkpoint, or none in that folder.
    """
    from omegaconf import OmegaConf

    import lavis_svp.runners  # noqa: F401  (LAVIS first, so that a missing one is said at once)
    from lavis_svp.common.checkpoints import newest_checkpoint, read_checkpoint

    checkpoint = Path(args.checkpoint) if args.checkpoint else None
    if checkpoint is not None and checkpoint.is_dir():
        folder, checkpoint = checkpoint, newest_checkpoint(checkpoint)
        if checkpoint is None:
            raise FileNotFoundError(f"There is no checkpoint in {folder}.")
    if args.cfg_path or checkpoint is None:
        project = launch.read_project(args.cfg_path, args.options)
    else:
        stored = OmegaConf.create(read_checkpoint(checkpoint)["config"])
        project = OmegaConf.merge(stored, OmegaConf.from_dotlist(launch.dot_list(args.options)))
    project.run.evaluate = True
    if checkpoint is None and project.run.get("output_dir"):
        checkpoint = newest_checkpoint(Path(project.run.output_dir))
    if checkpoint is not None and not checkpoint.exists():
        raise FileNotFoundError(f"There is no checkpoint at {checkpoint}.")
    if checkpoint is not None:
        launch.weights_from_checkpoint(project)
    return checkpoint, launch.build_config(project)


def loaded_runner(config: Any, checkpoint: Path | None) -> Any:
    """Build the runner and put the checkpoint's weights into its model.

    Args:
        config: of :func:`read_command`.
        checkpoint: likewise.
    """
    from lavis_svp.common.checkpoints import load_trained_state, read_checkpoint

    runner = launch.build_runner(config)
    if checkpoint is None:
        model = config.model_cfg
        loaded = [model.get(key) for key in ("pretrained", "finetuned") if model.get(f"load_{key}")]
        if loaded:
            logging.info("No checkpoint: evaluates the weights that the configuration loads: %s", ", ".join(loaded))
        else:
            logging.warning("No checkpoint, and the configuration loads none: an untrained model is evaluated.")
    else:
        logging.info("Evaluates %s", checkpoint)
        if hasattr(runner, "load_checkpoint"):
            runner.load_checkpoint(checkpoint)
        else:
            load_trained_state(runner._model, read_checkpoint(checkpoint)["model"], checkpoint)
    return runner


if __name__ == "__main__":
    main()
