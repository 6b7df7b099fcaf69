"""``shipped``: a training checkpoint as the small file that comes with the package.

One ``.safetensors`` file with what the zoo's weights do not hold: no frozen weights, no optimizer. Matrices are bf16.
Vectors, scalars and running statistics stay as they are: they are under a hundredth of the bytes, a bf16 running
variance would shift every state that it normalises, and a counter is no measurement to round. Beside it stands a record
with its sha256. Its metadata says what it was trained from, and as which model: ``models/trained_as.py`` compares that.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_svp.models.options import ModelOptions

NAME = "svp_ris_tiny"
LIMIT = 60_000_000  # bytes: more does not belong into a repository
STRUCTURED = ("origin", "model", "presence")  # entries of the metadata that are JSON
SUMMARY = "result/*.summary.json"  # what a run writes at its end, with its command


def add_command(commands: Any) -> None:
    """Add ``shipped`` to the sub-commands of ``python -m lavis_svp.export``."""
    parser = commands.add_parser("shipped", help="a checkpoint of svp_ris/tiny as the file that comes with the package")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder: its newest")
    parser.add_argument("out", type=Path, nargs="?", help=f"default: the package's own weights/{NAME}.safetensors")
    parser.add_argument("--command", help="what trained it; default: the command in the run's own summary")
    parser.add_argument("--presence", type=Path, help="calibration: the JSON that `probe absence` wrote")
    parser.set_defaults(run=lambda args: ship(args.checkpoint, args.out, args.command, args.presence))


def ship(checkpoint: Path, out: Path | None = None, command: str | None = None, presence: Path | None = None) -> Path:
    """Write the file and its record, once a model that loads the file has been compared with the trained one.

    Args:
        checkpoint: a checkpoint of ``svp_ris`` with its configuration, or a folder of which the newest is taken.
        out: the ``.safetensors`` file; an older one is replaced. None = ``lavis_svp/weights/svp_ris_tiny.safetensors``.
        command: what trained it; None = as the summary beside the checkpoint says.
        presence: what ``python -m lavis_svp.probe absence`` wrote about these weights; None = not calibrated.

    Returns:
        the file.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: above ``LIMIT``, of parts that are not the zoo's, without a known command, or not read back as
            written.
    """
    import torch
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    import lavis_svp.models  # noqa: F401  (LAVIS and the registrations)
    from lavis_svp.common.checkpoints import read_checkpoint
    from lavis_svp.export.merge import model_section
    from lavis_svp.export.parity import compare, observe
    from lavis_svp.models.presence import PRESENCE, read_fit
    from lavis_svp.models.pretrained import find_weights
    from lavis_svp.models.svp_ris import SvpRis
    from lavis_svp.zoo.shipped import get_shipped

    target = out or get_shipped(NAME).file
    if target.suffix != ".safetensors":
        raise ValueError(f"The file to write is a .safetensors, got {target}.")
    path = find_weights(checkpoint)
    section = model_section(path, None, ())
    contents = read_checkpoint(path)
    model = SvpRis.from_config(section).eval()
    model.load_checkpoint(str(path))
    metadata = describe(model.options, contents, command or _command_of(path.parent))
    if presence is not None:
        metadata[PRESENCE] = read_fit(presence)
    state = compact(model.checkpoint_state())
    check_size(state)
    before = observe(model)
    del model
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}.tmp.safetensors")
    try:
        save_file(state, unfinished, metadata)
        again = SvpRis.from_config(
            OmegaConf.merge(section, {"load_finetuned": True, "finetuned": str(unfinished)})
        ).eval()
        loaded = again.checkpoint_state()
        wrong = [name for name in state if not torch.equal(loaded[name].to(state[name].dtype), state[name])]
        if wrong or loaded.keys() != state.keys():
            raise ValueError(f"The file is not read back as it was written: {', '.join(wrong) or 'names differ'}.")
        difference = compare(before, observe(again))
        unfinished.chmod(0o644)  # safetensors makes files that only their owner may read
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    write_record(target, metadata)
    print(f"Checkpoint: {path}, {metadata['steps']} steps, seed {metadata['seed']}.")
    print(f"In bf16 against the checkpoint: {difference}.")
    print(f"{target}: {len(state)} tensors, {target.stat().st_size / 1e6:.1f} MB ({_by_part(state)}).")
    return target


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in bf16, all else as it is; on the CPU, contiguous and sharing no memory.

    Args:
        state: a model's ``checkpoint_state()``.

    Raises:
        ValueError: a tensor of the frozen half, which the named weights hold.
    """
    import torch

    from lavis_svp.models.parameters import part_of

    frozen = [name for name in state if part_of(name) == "frozen"]
    if frozen:
        raise ValueError(f"Frozen weights are not shipped, but the checkpoint changes {', '.join(frozen[:3])}.")
    small = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.ndim >= 2 else tensor
        for name, tensor in state.items()
    }
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in small.items()}


def check_size(state: Mapping[str, Tensor]) -> None:
    """Refuse weights above ``LIMIT``.

    Raises:
        ValueError: with the size of each part.
    """
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if total > LIMIT:
        raise ValueError(
            f"The weights take {total / 1e6:.1f} MB, the limit is {LIMIT / 1e6:.0f} MB: {_by_part(state)}. Train less "
            "of the language model (model.language.num_layers, or tuning: lora)."
        )


def describe(options: ModelOptions, contents: Mapping[str, Any], command: str) -> dict[str, str]:
    """The metadata: origin with licences, the model section, steps, seed, command and date.

    Args:
        options: of the trained model.
        contents: of its checkpoint.
        command: what trained it.

    Raises:
        ValueError: the model is made of weights that are not the zoo's: the file would be of no use elsewhere.
    """
    from lavis_svp.models.trained_as import MODEL, model_json
    from lavis_svp.zoo import list_weights

    known = {entry.name: entry for entry in list_weights()}
    roles = {
        options.language.name: "language model, trained further",
        options.sam.name: "mask decoder, trained further; its encoder, needed beside this file, is not in it",
        options.vision_encoder.name: "frozen vision encoder, needed beside this file, not in it",
    }
    strangers = [name for name in roles if name not in known]
    if strangers:
        raise ValueError(f"Shipped weights are made from the zoo's, but this model uses {', '.join(strangers)}.")
    origin = [
        {
            "name": name,
            "role": role,
            "source": known[name].source,
            "licence": known[name].licence,
            "notice": known[name].notice,
        }
        for name, role in roles.items()
    ]
    run = contents.get("config", {}).get("run", {})
    return {
        "format": "pt",  # what transformers expects of a safetensors file
        "origin": json.dumps(origin),
        MODEL: model_json(options),
        "steps": str(contents.get("iters", "unknown")),
        "seed": str(run.get("seed", "unknown")),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_record(file: Path, metadata: Mapping[str, str]) -> None:
    """Write ``<name>.json`` beside a file: its size, sha256 and metadata."""
    from lavis_svp.metrics.files import write_json
    from lavis_svp.zoo.download import sha256_of

    readable = {key: json.loads(value) if key in STRUCTURED else value for key, value in metadata.items()}
    record = {"file": file.name, "size": file.stat().st_size, "sha256": sha256_of(file), **readable}
    write_json(file.with_suffix(".json"), record)


def _command_of(folder: Path) -> str:
    """The command in the newest summary that the run wrote."""
    summaries = sorted(folder.glob(SUMMARY), key=lambda path: path.stat().st_mtime)
    if not summaries:
        raise ValueError(f"No summary in {folder / 'result'} tells the command of the training; give --command.")
    command: str = json.loads(summaries[-1].read_text(encoding="utf-8"))["run"]["command"]
    return command


def _by_part(state: Mapping[str, Tensor]) -> str:
    from lavis_svp.models.parameters import part_of

    sizes: Counter[str] = Counter()
    for name, tensor in state.items():
        sizes[part_of(name)] += tensor.numel() * tensor.element_size()
    return ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in sizes.most_common())
