"""``lavis-svp data``: check, convert and make data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_svp.cli.common import (
    add_command,
    add_max_image_pixels,
    add_old_flag,
    at_least_one,
    command_parser,
    user_errors,
)
from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.custom_formats import TEXT_KEY, CocoExpressions, JsonlSource
from lavis_svp.datasets.layout import PUBLIC, SPECS, MissingDataError, annotation_files, doctor_command, find_images
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refshapes.build import DEFAULT_SIZES
from lavis_svp.datasets.refshapes.config import BACKGROUNDS
from lavis_svp.datasets.refthings.build import DEFAULT_SIZES as THINGS_SIZES
from lavis_svp.datasets.shards.format import IMAGES_PER_SHARD
from lavis_svp.datasets.sources import DataSource, ImageFolder


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp data``."""
    parser = command_parser(
        "data",
        "Check, convert and make data sets of referring expressions. docs/data.md describes the formats.",
        "lavis-svp data doctor --root /data/refer_seg",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    root = "the folder that holds refcoco/, refcoco+/ ..."
    text = "name the missing files of RefCOCO's family and count what is there; exit code 0 only if all is complete"
    sub = add_command(commands, "doctor", run_doctor, text, "data doctor --root /data/refer_seg --dataset refcoco")
    sub.add_argument("--root", required=True, type=Path, help=root)
    sub.add_argument("--dataset", choices=list(SPECS), action="append", help="default: the four public ones")
    sub.add_argument("--split-by", help="partition, e.g. unc, umd, google; default: the usual one")
    sub.add_argument("--images", type=Path, help="the images' folder or one above it; default: below the root")
    sub.add_argument("--subset", action="store_true", help="accept a subset, with other counts than the published")

    text = "count the images (and training expressions) of each training split that another data set holds out"
    sub = add_command(commands, "leaks", run_leaks, text, "data leaks --root /data/refer_seg --usual")
    sub.add_argument("--root", required=True, type=Path, help=root)
    sub.add_argument("--usual", action="store_true", help="leave out partitions that few use (refcoco(g): google)")

    text = "convert data into webdataset shards, and check shards"
    shards = add_command(commands, "shards", None, text, "data shards convert --out shards/mine --jsonl data.jsonl")
    verbs = shards.add_subparsers(required=True, metavar="COMMAND")
    text = "write shards; run again after an interruption it goes on, and it repairs damaged shards"
    sub = add_command(verbs, "convert", run_convert, text, "data shards convert --out shards/mine --jsonl data.jsonl")
    sub.add_argument("--out", type=Path, required=True, help="folder of the shards")
    kind = sub.add_mutually_exclusive_group(required=True)
    kind.add_argument("--dataset", choices=list(SPECS), help="a data set in RefCOCO's format")
    kind.add_argument("--coco", type=Path, help="COCO's instances.json with expressions")
    kind.add_argument("--jsonl", type=Path, help="one JSON line per image")
    sub.add_argument("--root", type=Path, help="with --dataset: the folder that holds refcoco/ ...")
    sub.add_argument("--split-by", help="with --dataset: partition, e.g. unc, umd, google; default: the usual one")
    sub.add_argument("--images", type=Path, help="the images' folder; default: below --root, or next to --jsonl")
    sub.add_argument("--expressions", type=Path, help="with --coco: JSON, annotation id -> expressions")
    sub.add_argument("--text-key", default=TEXT_KEY, help="with --coco: the annotations' key with expressions")
    sub.add_argument("--splits", nargs="+", help="default: all")
    text = "largest number of images in a shard (default: %(default)s)"
    sub.add_argument("--images-per-shard", type=at_least_one, default=IMAGES_PER_SHARD, metavar="N", help=text)
    add_old_flag(sub, "--pictures-per-shard", "images_per_shard", at_least_one)
    sub.add_argument("--superpixels", type=Path, help="a store (<generator>-<digest>) or superpixel shards to pack in")
    sub.add_argument("--features", type=Path, help="a cache of frozen features (features/<digest>) to pack in")
    text = "pack also files to which links lead out of the images' folder; otherwise they are errors"
    sub.add_argument("--follow-links", action="store_true", help=text)
    sub.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read; exit code 1")
    add_max_image_pixels(sub)
    text = "read every byte of a folder of shards and name every fault; exit code 1 if there is one"
    sub = add_command(verbs, "validate", run_validate, text, "data shards validate shards/mine")
    sub.add_argument("folder", type=Path)
    add_max_image_pixels(sub)
    text = "print what a folder of shards holds, and what it was made from"
    add_command(verbs, "info", run_info, text, "data shards info shards/mine").add_argument("folder", type=Path)

    text = "draw the built-in data set RefShapes in RefCOCO's format"
    example = "data refshapes --root data --train 100 --val 10 --test 10"
    sub = add_command(commands, "refshapes", run_refshapes, text, example)
    text = "data folder (default: %(default)s)"
    data_folder: dict[str, Any] = {"type": Path, "default": cache_root() / "data", "help": text}
    sub.add_argument("--root", **data_folder)
    for split, count in DEFAULT_SIZES.items():
        sub.add_argument(f"--{split}", type=int, default=count, help=f"number of {split} images (%(default)s)")
    sub.add_argument(
        "--seed", type=int, default=0, help="another seed gives other images, in a root of their own (%(default)s)"
    )
    text = "photos behind the training images: none that is tested on, or those of releases 0.1 to 0.5 (%(default)s)"
    sub.add_argument("--backgrounds", choices=list(BACKGROUNDS), default="untested", help=text)
    text = "compose the built-in data set RefThings, named things on photographs, in RefCOCO's format"
    example = "data refthings --root data --train 100 --val 10 --test 10"
    sub = add_command(commands, "refthings", run_refthings, text, example)
    sub.add_argument("--root", **data_folder)
    for split, count in THINGS_SIZES.items():
        sub.add_argument(f"--{split}", type=int, default=count, help=f"number of {split} images (%(default)s)")
    sub.add_argument(
        "--seed", type=int, default=0, help="another seed gives other images, in a root of their own (%(default)s)"
    )
    text = "folder of RGBA cut-outs with their table, things.yaml (default: emoji renders, which npm downloads)"
    sub.add_argument("--cutouts", type=Path, help=text)
    text = "write a folder of cut-outs for RefThings, photographs out of Debian's tuxpaint-stamps-default (GPL-2)"
    sub = add_command(commands, "stamps", run_stamps, text, "data stamps --out CUTOUTS")
    sub.add_argument("--out", type=Path, required=True, help="folder of the cut-outs, for data refthings --cutouts")
    text = "write a few real photos with hand-written expressions in RefCOCO's format, for testing"
    add_command(commands, "photos", run_photos, text, "data photos --root data").add_argument("--root", **data_folder)
    text = "write real photographs with masks and expressions made by hand in RefCOCO's format, for testing"
    sub = add_command(commands, "refphotos", run_refphotos, text, "data refphotos --root data")
    sub.add_argument("--root", **data_folder)
    text = "leave out the photographs of Debian packages, which apt-get downloads"
    sub.add_argument("--no-debian", action="store_true", help=text)
    text = "write real photographs with masks and expressions made by hand in RefCOCO's format, to train on"
    example = "data trainphotos --root data --views 4"
    sub = add_command(commands, "trainphotos", run_trainphotos, text, example)
    sub.add_argument("--root", **data_folder)
    text = (
        "parts of each training photograph that are added as photographs of their own (default: as many as are there)"
    )
    sub.add_argument("--views", type=int, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on the words after it; returns the exit code."""
    args = build_parser().parse_args(argv)
    with user_errors():
        return args.run(args)


def run_doctor(args: argparse.Namespace) -> int:
    """``doctor``: print a diagnosis of each data set."""
    from lavis_svp.datasets.doctor import diagnose, shared_images

    names = args.dataset or list(PUBLIC)
    for name in names:
        if args.split_by and args.split_by not in SPECS[name].split_by:
            raise ValueError(f"--split-by {args.split_by}: {name} has {', '.join(SPECS[name].split_by)}")
    results = [
        diagnose(args.root, name, args.split_by or SPECS[name].split_by[0], args.images, args.subset) for name in names
    ]
    print("\n\n".join(result.text() for result in results))
    shared = shared_images(results)
    if shared:
        print("\nFor training on several of them, or against leaks:\n  " + "\n  ".join(shared))
    return int(any(result.problems for result in results))


def run_leaks(args: argparse.Namespace) -> int:
    """``leaks``: print the table; exit code 0 if at least one file of references was read."""
    from lavis_svp.datasets.disjoint import leak_table, read_use, title
    from lavis_svp.metrics.report import format_table

    partitions = [(name, part) for name in PUBLIC for part in SPECS[name].split_by[: 1 if args.usual else None]]
    read = {key: read_use(args.root, *key) for key in partitions}
    uses = [use for use in read.values() if use is not None]
    absent = [title(*key) for key, use in read.items() if use is None]
    if uses:
        print("Images of each training split that are held out elsewhere (and their training expressions):\n")
        print(format_table(leak_table(uses)))
    if absent:
        print(f"\nThese were not found and are not counted: {', '.join(absent)}. See lavis-svp data doctor --help")
    return int(not uses)


def open_source(args: argparse.Namespace) -> tuple[DataSource, Mapping[str, object]]:
    """The annotations and images that ``shards convert`` reads, and what names them in the index.

    Raises:
        MissingDataError: a file is not there.
        ValueError: a file is damaged, or the options do not fit together.
    """
    if args.jsonl is not None:
        jsonl = JsonlSource(args.jsonl, args.images, args.follow_links)
        return DataSource(jsonl, ImageFolder(jsonl.folder)), _identity("jsonl", args.jsonl)
    if args.coco is not None:
        if args.images is None:
            raise ValueError("--coco needs --images, the folder of the images.")
        files = [args.coco] if args.expressions is None else [args.coco, args.expressions]
        coco = CocoExpressions(args.coco, args.expressions, args.text_key)
        return DataSource(coco, ImageFolder(args.images)), {**_identity("coco", *files), "text_key": args.text_key}
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
    return DataSource(source, images), identity


def _identity(kind: str, *files: Path) -> dict[str, object]:
    from lavis_svp.datasets.shards.write import file_sum

    return {"format": kind, "sha256": {path.name: file_sum(path) for path in files}}


def run_convert(args: argparse.Namespace) -> int:
    """``shards convert``: make shards."""
    from lavis_svp.datasets.shards.write import Conversion, FeatureExtra, SuperpixelExtra, convert

    source, identity = open_source(args)
    kinds = ((SuperpixelExtra, args.superpixels), (FeatureExtra, args.features))
    extras = [kind(folder) for kind, folder in kinds if folder is not None]
    plan = Conversion(
        source.annotations,
        source.images,
        identity,
        args.splits,
        args.images_per_shard,
        extras,
        args.skip_broken,
        args.follow_links,
        args.max_image_pixels,
    )
    index = convert(plan, args.out)
    print(f"{len(index.samples):,} images in {len(index.shards):,} shards in {args.out}")
    for one in index.left_out:
        print(f"left out: {one['file_name']} ({one['split']}): {one['reason']}", file=sys.stderr)
    return int(bool(index.left_out))


def run_validate(args: argparse.Namespace) -> int:
    """``shards validate``: read everything, name every fault."""
    from lavis_svp.datasets.shards.validate import validate

    report = validate(args.folder, max_image_pixels=args.max_image_pixels)
    print(report.text())
    return int(bool(report.faults))


def run_info(args: argparse.Namespace) -> int:
    """``shards info``: print the contents and the settings of a folder of shards."""
    from lavis_svp.datasets.shards.read import ShardSource

    source = ShardSource(args.folder)
    index = source.index
    for split in source.splits():
        _, images, expressions = source.counts(split)
        names = {sample.shard for sample in index.samples if sample.image.split == split}
        size = sum(index.shards[name]["bytes"] for name in names) / 1e6
        print(f"{split}: {images:,} images, {expressions:,} expressions, {len(names):,} shards, {size:,.1f} MB")
    if index.left_out:
        print(f"left out: {len(index.left_out):,} images")
    print(json.dumps(index.settings, indent=1, sort_keys=True))
    return 0


def run_refshapes(args: argparse.Namespace) -> int:
    """``refshapes``: make RefShapes."""
    from lavis_svp.datasets.refshapes.build import build_refshapes

    sizes = {split: getattr(args, split) for split in DEFAULT_SIZES}
    print(f"RefShapes is in {build_refshapes(args.root, sizes, args.seed, backgrounds=args.backgrounds)}")
    return 0


def run_refthings(args: argparse.Namespace) -> int:
    """``refthings``: make RefThings."""
    from lavis_svp.datasets.refthings.build import build_refthings
    from lavis_svp.datasets.refthings.config import RefThingsConfig

    sizes = {split: getattr(args, split) for split in THINGS_SIZES}
    config = RefThingsConfig(cutouts=None if args.cutouts is None else str(args.cutouts))
    print(f"RefThings is in {build_refthings(args.root, sizes, args.seed, config)}")
    return 0


def run_stamps(args: argparse.Namespace) -> int:
    """``stamps``: fetch the stamps and write their folder."""
    from lavis_svp.datasets.refthings.stamps import GPL_NOTICE, make_stamps

    print(f"The cut-outs are in {make_stamps(args.out)}\n{GPL_NOTICE}")
    return 0


def run_photos(args: argparse.Namespace) -> int:
    """``photos``: fetch the photos and write their annotations."""
    from lavis_svp.datasets.photos.build import build_photos

    print(f"The photos are in {build_photos(args.root)}")
    return 0


def run_refphotos(args: argparse.Namespace) -> int:
    """``refphotos``: fetch the photographs and write their annotations."""
    from lavis_svp.datasets.refphotos.build import build_refphotos

    print(f"The photographs are in {build_refphotos(args.root, debian=not args.no_debian)}")
    return 0


def run_trainphotos(args: argparse.Namespace) -> int:
    """``trainphotos``: fetch the photographs to train on and write their annotations."""
    from lavis_svp.datasets.trainphotos import build_trainphotos

    print(f"The photographs are in {build_trainphotos(args.root, views=args.views)}")
    return 0
