"""Where a run starts: anew, or at a checkpoint, whose settings it compares with its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_svp.common import checkpoints
from lavis_svp.runners.processes import from_main, is_main, wait_for_all

if TYPE_CHECKING:
    from lavis_svp.runners.runner_svp import RunnerSVP

# Keys of `run:` that do not change what is computed.
HARMLESS = (
    "output_dir", "num_workers", "batch_size_eval", "log_freq", "save_every", "keep_checkpoints", "eval_every",
    "evaluate", "valid_splits", "test_splits", "test_checkpoint", "resume", "resume_ckpt_path", "dist_url", "rank",
    "gpu", "log_to", "wandb_project", "sync_timing", "checkpoint_format",
)  # fmt: skip


class Resumer:
    """Finds the checkpoint to continue from and loads it.

    Args:
        runner: gives the options, the folder, the model, the optimizer and the scaler.
    """

    def __init__(self, runner: RunnerSVP) -> None:
        self.runner = runner
        self.folder = Path(runner.output_dir)

    def resume(self) -> int:
        """Load the checkpoint that ``run.resume`` asks for, if there is one.

        Returns:
            The number of optimizer steps that are done: 0 for a new run.

        Raises:
            FileNotFoundError: ``run.resume`` names a file that is not there.
            WrongCheckpointError: the checkpoint is of another model.
        """
        path = from_main(str(self._find() or "") if is_main() else None)
        wait_for_all()
        if not path:
            return 0
        return self._load(Path(path))

    def _find(self) -> Path | None:
        """In the main process: clean up, then choose the file.

        A named checkpoint of this folder is taken, and newer ones are set aside. One from elsewhere starts a run, which
        later continues with its own checkpoints.
        """
        options = self.runner.options
        checkpoints.remove_unfinished(self.folder)
        choice = options.resume_ckpt_path or options.resume
        named = None if choice in ("auto", "never") else Path(choice)
        if named is not None and not named.exists():
            raise FileNotFoundError(f"run.resume names {named}, which is not there.")
        if named is not None and named.resolve().parent == self.folder.resolve():
            named = self.folder / named.name
            self._say_aside(checkpoints.set_newer_aside(named), "checkpoints newer than run.resume's")
            return named
        newest = None if choice == "never" else checkpoints.newest_checkpoint(self.folder)
        if newest is not None and named is not None:
            logging.warning("run.resume's %s started this run, which has got to %s.", named, newest)
        found = newest or named
        if found is None or found.parent != self.folder:
            self._say_aside(checkpoints.set_aside(self.folder), "an earlier run")
        return found

    def _say_aside(self, aside: Path | None, what: str) -> None:
        if aside is not None:
            logging.warning("%s held %s, now in %s.", self.folder, what, aside)

    def _load(self, path: Path) -> int:
        runner = self.runner
        contents = checkpoints.read_checkpoint(path)
        lacking = [key for key in checkpoints.KEYS if key not in contents]
        if lacking:
            raise checkpoints.WrongCheckpointError(
                f"{path} cannot be continued: it lacks {', '.join(lacking)}. To start from its weights only, "
                "set model.load_finetuned: True and model.finetuned to it."
            )
        runner.restore(contents, path)
        self._compare(contents["config"])
        logging.info("Resume at step %d from %s", contents["iters"], path)
        return int(contents["iters"])

    def _compare(self, config: Mapping[str, Any]) -> None:
        """Warn about settings that differ from the checkpoint's: the run goes on, but is not the run it was."""
        before, now = _flat(config), _flat(self.runner.config.to_dict())
        ignored = {f"run.{key}" for key in HARMLESS}
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and key not in ignored]
        for key in changed:
            logging.warning(
                "%s was %r when the checkpoint was made, and is %r now.", key, before.get(key), now.get(key)
            )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        path: leaf for key, value in node.items() for path, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()
    }
