"""``consolidate``: DeepSpeed's sharded checkpoints as one trainable-only LAVIS checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """Add ``consolidate`` to the sub-commands of ``python -m lavis_svp.export``."""
    parser = commands.add_parser("consolidate", help="DeepSpeed shards into one trainable-only checkpoint")
    parser.add_argument(
        "folder",
        type=Path,
        help="checkpoint_<steps>.shards, or any folder that a DeepSpeed engine saved (with 'latest')",
    )
    parser.add_argument("--out", required=True, type=Path, help="the .pth file to write; must not exist")
    parser.set_defaults(run=lambda args: consolidate(args.folder, args.out))


def consolidate(folder: Path, out: Path) -> None:
    """Put the shards of any ZeRO stage and number of processes together, in fp32.

    A folder of ours gives what the run's whole checkpoint would have held, and is checked against its digests. A folder
    of somebody else's (LISA's or GLaMM's ``ckpt_model/``) gives the trained weights, and AdamW's moments where it has
    them.

    Args:
        folder: with the shards.
        out: the file to write.

    Raises:
        FileNotFoundError: no DeepSpeed checkpoint, or shards are missing; names them.
        CorruptCheckpointError: a file is damaged, or holds code.
        ValueError: ``out`` is there already, or a kind of checkpoint that is not understood.
    """
    from lavis_svp.common.checkpoints import read_checkpoint, save_checkpoint
    from lavis_svp.common.shard_folders import is_shard_folder
    from lavis_svp.common.zero_shards import read_zero_folder
    from lavis_svp.common.zero_state_dict import trained_checkpoint

    if out.exists():
        raise ValueError(f"{out} exists already; name another file.")
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder at {folder}.")
    contents = read_checkpoint(folder) if is_shard_folder(folder) else trained_checkpoint(read_zero_folder(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, contents)
    numbers = sum(tensor.numel() for tensor in contents["model"].values())
    moments = "with" if contents.get("optimizer", {}).get("state") else "without"
    print(f"{out}: {len(contents['model'])} tensors, {numbers:,} numbers, {moments} AdamW's moments.")
