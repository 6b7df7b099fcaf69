"""``python -m lavis_svp.datasets.shards``: referring data in webdataset shards.

    convert --out FOLDER SOURCE    make shards; run again after an interruption, it goes on; repairs damaged ones
    validate FOLDER                read everything, name every fault; exit code 1 if there is one
    info FOLDER                    what is in it, and what it was made from

SOURCE is one of

    --dataset refcoco --root DIR [--split-by unc] [--images DIR]     RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO ...
    --coco instances.json --images DIR [--expressions FILE] [--text-key KEY]
    --jsonl FILE [--images DIR]

See docs/data.md for the formats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis_svp.datasets.coco_expressions import TEXT_KEY, CocoExpressions
from lavis_svp.datasets.jsonl import JsonlSource
from lavis_svp.datasets.layout import SPECS, MissingDataError, annotation_files, doctor_command, find_images
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.shards.extras import Extra, FeatureExtra, SuperpixelExtra
from lavis_svp.datasets.shards.source import ShardSource
from lavis_svp.datasets.shards.validate import validate
from lavis_svp.datasets.shards.write import IMAGES_PER_SHARD, Plan, convert, file_sum
from lavis_svp.datasets.source import AnnotationSource, ImageFolder


def open_source(args: argparse.Namespace) -> tuple[AnnotationSource, ImageFolder, dict[str, object]]:
    """The annotations, the images, and what names them in the index.

    Raises:
        MissingDataError: a file is not there.
        ValueError: a file is damaged, or the options do not fit together.
    """
    if args.jsonl is not None:
        jsonl = JsonlSource(args.jsonl, args.images)
        return jsonl, ImageFolder(jsonl.folder), _identity("jsonl", args.jsonl)
    if args.coco is not None:
        if args.images is None:
            raise ValueError("--coco needs --images, the folder of the images.")
        files = [args.coco] if args.expressions is None else [args.coco, args.expressions]
        coco = CocoExpressions(args.coco, args.expressions, args.text_key)
        return coco, ImageFolder(args.images), {**_identity("coco", *files), "text_key": args.text_key}
    if args.root is None:
        raise ValueError("--dataset needs --root, the folder that holds refcoco/, refcoco+/ ...")
    partition = args.split_by or SPECS[args.dataset].split_by[0]
    found = annotation_files(args.root, args.dataset, partition)
    if found.missing():
        missing = " and ".join(map(str, found.missing()))
        raise MissingDataError(f"There is no {missing}. What goes where: {doctor_command(args.root, args.dataset)}")
    source = RefCOCO(found.instances, found.refs)
    first = source.images(source.splits()[0])[0].file_name
    images = ImageFolder(find_images(args.root, args.dataset, first, args.images))
    identity = {**_identity("refcoco", found.instances, found.refs), "dataset": args.dataset, "split_by": partition}
    return source, images, identity


def run_convert(args: argparse.Namespace) -> int:
    """``convert``: make shards."""
    source, images, identity = open_source(args)
    extras: list[Extra] = []
    if args.superpixels is not None:
        extras.append(SuperpixelExtra(args.superpixels))
    if args.features is not None:
        extras.append(FeatureExtra(args.features))
    plan = Plan(source, images, identity, args.splits, args.images_per_shard, extras, args.skip_broken)
    index = convert(plan, args.out)
    print(f"{len(index.samples):,} images in {len(index.shards):,} shards in {args.out}")
    for one in index.left_out:
        print(f"left out: {one['file_name']} ({one['split']}): {one['reason']}", file=sys.stderr)
    return int(bool(index.left_out))


def run_validate(args: argparse.Namespace) -> int:
    """``validate``: read everything, name every fault."""
    report = validate(args.folder)
    print(report.text())
    return int(bool(report.faults))


def run_info(args: argparse.Namespace) -> int:
    """``info``: what is in a folder of shards."""
    source = ShardSource(args.folder)
    index = source.index
    for split in source.splits():
        counts = source.counts(split)
        names = {sample.shard for sample in index.samples if sample.image["split"] == split}
        size = sum(index.shards[name]["bytes"] for name in names)
        print(
            f"{split}: {counts.images:,} images, {counts.sentences:,} expressions, {len(names):,} shards, "
            f"{size / 1e6:,.1f} MB"
        )
    if index.left_out:
        print(f"left out: {len(index.left_out):,} images")
    print(json.dumps(index.settings, indent=1, sort_keys=True))
    return 0


def _identity(kind: str, *files: Path) -> dict[str, object]:
    return {"format": kind, "sha256": {path.name: file_sum(path) for path in files}}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lavis_svp.datasets.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("convert", help="make shards")
    sub.set_defaults(run=run_convert)
    sub.add_argument("--out", type=Path, required=True, help="folder of the shards")
    kind = sub.add_mutually_exclusive_group(required=True)
    kind.add_argument("--dataset", choices=list(SPECS), help="a data set in RefCOCO's format")
    kind.add_argument("--coco", type=Path, help="COCO's instances.json with expressions")
    kind.add_argument("--jsonl", type=Path, help="one JSON line an image")
    sub.add_argument("--root", type=Path, help="of --dataset: the folder that holds refcoco/ ...")
    sub.add_argument("--split-by", help="of --dataset: partition, e.g. unc, umd, google; default: the usual one")
    sub.add_argument("--images", type=Path, help="the images' folder; default: found below --root, beside --jsonl")
    sub.add_argument("--expressions", type=Path, help="of --coco: JSON, annotation id -> expressions")
    sub.add_argument("--text-key", default=TEXT_KEY, help="of --coco: the annotations' key with expressions")
    sub.add_argument("--splits", nargs="+", help="default: all")
    sub.add_argument("--images-per-shard", type=int, default=IMAGES_PER_SHARD)
    sub.add_argument("--superpixels", type=Path, help="a store (<generator>-<digest>) or superpixel shards to pack in")
    sub.add_argument("--features", type=Path, help="a cache of frozen features (features/<digest>) to pack in")
    sub.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read; exit code 1")
    for name, run in (("validate", run_validate), ("info", run_info)):
        sub = commands.add_parser(name, help=(run.__doc__ or "").strip())
        sub.set_defaults(run=run)
        sub.add_argument("folder", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    args = read_arguments(arguments)
    try:
        return args.run(args)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
