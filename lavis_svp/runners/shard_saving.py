"""Write a checkpoint in parts, each process its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import distributed

from lavis_svp.common import checkpoints
from lavis_svp.common.shard_folders import REST, describe_files, write_complete
from lavis_svp.runners.processes import gather, is_main, wait_for_all


def save_shards(engine: Any, path: Path, rest: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write ``checkpoint_<steps>.shards``; it appears under its name only when all its parts are on the disk.

    Collective: every process calls this. The folder must be one that all of them see.

    Args:
        engine: a DeepSpeed engine; writes its fp32 weights and optimizer state without the frozen parameters.
        path: the folder to write.
        rest: a whole checkpoint without what the engine writes; see :func:`checkpoints.read_checkpoint`.
        facts: told in ``complete.json`` beside the files' digests.
    """
    temporary = path.with_name(f"{checkpoints.TEMPORARY}{path.name}")
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        checkpoints.save_checkpoint(temporary / REST, rest)
    wait_for_all()
    engine.save_checkpoint(str(temporary), tag=f"global_step{rest['iters']}", exclude_frozen_parameters=True)
    wait_for_all()
    world = distributed.get_world_size()
    described = gather(describe_files(temporary, distributed.get_rank(), world))
    if is_main():
        files = {name: entry for part in described for name, entry in sorted(part.items())}
        write_complete(temporary, {"steps": rest["iters"], "world_size": world, **facts, "files": files})
        checkpoints.remove_checkpoint(path)  # a damaged one, which the run went back behind
        os.replace(temporary, path)
        checkpoints.sync_folder(path.parent)
    wait_for_all()
