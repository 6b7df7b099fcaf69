"""``python -m lavis_svp.zoo list | fetch NAME... | fetch --all | verify [NAME...] | import-glamm FOLDER OUT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis_svp.zoo.entries import get_entry, list_weights
from lavis_svp.zoo.glamm import LANGUAGE_FOLDER, SVP_FILE, import_glamm, report_lines
from lavis_svp.zoo.shipped import is_shipped, list_shipped, shipped_file, verify_shipped
from lavis_svp.zoo.store import fetch, is_cached, verify, weights_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 1 with the fault on stderr.

    Args:
        arguments: the words after the command; by default those of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m lavis_svp.zoo", description="The zoo of weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, what is cached, sizes and licences")
    fetching = commands.add_parser("fetch", help="download and convert weights")
    fetching.add_argument("names", nargs="*", metavar="NAME")
    fetching.add_argument("--all", action="store_true", help="every one")
    verifying = commands.add_parser("verify", help="compare cached and shipped files with their hashes")
    verifying.add_argument("names", nargs="*", metavar="NAME", help="by default every one that is there")
    importing = commands.add_parser("import-glamm", help="take a checkpoint of GLaMM or LISA apart")
    importing.add_argument("source", type=Path, metavar="FOLDER", help="its Hugging Face folder")
    importing.add_argument("target", type=Path, metavar="OUT", help="a folder that is made")
    importing.add_argument("--seg-id", type=int, help="id of [SEG], where the folder does not tell it")
    importing.add_argument("--with-projector", action="store_true", help="keep mm_projector, for the types glamm_*")
    options = parser.parse_args(arguments)
    if options.command == "fetch" and bool(options.names) == options.all:
        parser.error("fetch takes either names or --all")
    try:
        return _COMMANDS[options.command](options)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _list(_: argparse.Namespace) -> int:
    print(f"{'name':24} {'converted':>10} {'download':>9}  {'licence':10}  {'cached':6}  what")
    for entry in list_weights():
        size, archive = f"{entry.converted_size / 1e6:.0f} MB", f"{entry.archive_size / 1e6:.0f} MB"
        cached = "yes" if is_cached(entry.name) else "no"
        print(f"{entry.name:24} {size:>10} {archive:>9}  {entry.licence:10}  {cached:6}  {entry.what}")
        print(f"{'':24} from {entry.source}. {entry.notice}")
    for shipped in list_shipped():
        there = shipped.file.is_file()
        size, state = f"{shipped.file.stat().st_size / 1e6:.0f} MB" if there else "-", "yes" if there else "no"
        print(f"{shipped.name:24} {size:>10} {'shipped':>9}  {shipped.licence:10}  {state:6}  {shipped.what}")
        print(f"{'':24} {shipped.notice}" if there else f"{'':24} {shipped.absent}")
    print(f"\nCached in {weights_folder('')}. A local folder, checkpoint or hub id may stand wherever a name does.")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    names = [entry.name for entry in list_weights()] if options.all else options.names
    for name in names:
        _check_name(name)  # a wrong one is told before anything is downloaded
    for name in names:
        print(shipped_file(name) if is_shipped(name) else fetch(name))
    return 0


def _check_name(name: str) -> None:
    if not is_shipped(name):
        get_entry(name)


def _verify(options: argparse.Namespace) -> int:
    cached = [entry.name for entry in list_weights() if weights_folder(entry.name).exists()]
    names = options.names or [*cached, *(entry.name for entry in list_shipped() if entry.file.is_file())]
    faulty = False
    for name in names:
        _check_name(name)
        faults = verify_shipped(name) if is_shipped(name) else verify(name)
        faulty = faulty or bool(faults)
        for fault in faults or ["ok"]:
            print(f"{name}: {fault}")
        if faults and not is_shipped(name):
            print(f"{name}: delete {weights_folder(name)} and fetch it again")
    if not options.names and not cached:
        print("Nothing is cached yet.")
    return int(faulty)


def _import_glamm(options: argparse.Namespace) -> int:
    for line in report_lines(import_glamm(options.source, options.target, options.seg_id, options.with_projector)):
        print(line)
    print(f"\nmodel.language.name: {options.target / LANGUAGE_FOLDER}")
    print(f"model.load_pretrained: True\nmodel.pretrained: {options.target / SVP_FILE}")
    return 0


_COMMANDS = {"list": _list, "fetch": _fetch, "verify": _verify, "import-glamm": _import_glamm}

if __name__ == "__main__":
    sys.exit(main())
