"""``lavis-svp segment``: segment what an expression names, or answer a question about an image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lavis_svp.cli.common import add_device_option, add_max_image_pixels, command_parser, user_errors
from lavis_svp.common.images import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    import torch

    from lavis_svp.common.timing import Stopwatch

MODEL_TYPE = "tiny"  # of the shipped weights
ANSWERING = Path("output/svp/refshapes_vqa_tiny")
MAX_ANSWER_TOKENS = 60
DEMO_SEED = 1  # of the built-in image: a RefShapes scene that no split holds


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = command_parser(
        "segment",
        "Segment what an expression names. Prints the model's answer, and writes a PNG that shows the image, its\n"
        "superpixels and the predicted mask. With --question it answers in words, which needs a checkpoint of\n"
        "projects/svp/train/refshapes_vqa_tiny.yaml.",
        'lavis-svp segment photo.jpg "the red cup" --out cup.png\n'
        '  lavis-svp segment --question "how many red circles are there?"',
    )
    add = parser.add_argument
    add("image", nargs="?", help="an image file (default: a RefShapes scene, drawn for the demo)")
    add("expression", help='what to segment, such as "the red circle"')
    add("--question", action="store_true", help='the text is a question; "" asks for a caption')
    text = f"a checkpoint or its folder (default: the shipped weights; with --question {ANSWERING})"
    add("--checkpoint", type=Path, metavar="FILE", help=text)
    text, path = "the PNG to write (default: %(default)s)", Path("output/demo.png")
    add("--out", type=Path, default=path, metavar="FILE", help=text)
    add_max_image_pixels(parser)
    add_device_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on the words after it."""
    args = build_parser().parse_args(argv)
    with user_errors():
        if args.question:
            answer(args.image, args.expression, args.checkpoint or ANSWERING, args.device, args.max_image_pixels)
        else:
            segment(args.image, args.expression, args.checkpoint, args.out, args.device, args.max_image_pixels)


def segment(
    image: str | None,
    expression: str,
    checkpoint: Path | None,
    out: Path,
    device: str = "auto",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> None:
    """Predict the mask of an expression, print the answer and draw the mask.

    Raises:
        ValueError: the image, the expression or the checkpoint cannot be used.
        OSError: a file is not there, or cannot be read or written.
    """
    from lavis_svp.common.timing import Stopwatch
    from lavis_svp.common.visualization import panel, save_png
    from lavis_svp.processors.text import SvpReferringProcessor

    cleaned = SvpReferringProcessor()(expression)
    watch = Stopwatch()
    model, samples, pixels = _model_and_samples(image, checkpoint, device, max_image_pixels, watch)
    watch.device = model.device
    with watch.part("text and full-size mask"), watch.modules(model.timed_parts):
        prediction = model.predict_masks({**samples, "text_input": [cleaned]})[0][0]
    if prediction.error is not None:
        raise ValueError(prediction.error)
    labels = None if prediction.region_map is None else prediction.region_map.labels
    note = f"Note: {prediction.note}" if prediction.note else ""
    caption = f'"{expression}": {prediction.text} {note}'.strip()
    save_png(out, panel(pixels, labels, prediction.mask, caption=caption))
    share = prediction.mask.mean()
    print(f"Answer: {prediction.text}")
    if note:
        print(note)
    print(f"Visual tokens: {prediction.tokens}. Mask: {share:.1%} of the image, score {prediction.score:.2f}.")
    print(f"From file to mask in {watch.text()} (without loading the weights)")
    print(f"Image: {out}")


def answer(
    image: str | None,
    question: str,
    checkpoint: Path,
    device: str = "auto",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> None:
    """Print the answer to a question about an image; to an empty one, a caption. It raises as :func:`segment` does."""
    from lavis_svp.models.outputs import NoAnswer

    model, samples, _ = _model_and_samples(image, checkpoint, device, max_image_pixels)
    if question.strip():
        (text,) = model.predict_answers({**samples, "text_input": [question]}, max_len=MAX_ANSWER_TOKENS)
    else:
        (text,) = model.generate(samples, max_length=MAX_ANSWER_TOKENS)
    if isinstance(text, NoAnswer):
        raise ValueError(text.error)
    print(f"Answer: {text}")


def _model_and_samples(
    image: str | None,
    checkpoint: Path | None,
    device: str,
    max_image_pixels: int,
    watch: Stopwatch | None = None,
) -> tuple[Any, dict[str, Any], np.ndarray]:
    """The trained model and a batch of the image without a text, on a device; and the image's pixels (H, W, 3).

    Reading and scaling the image counts as a part of ``watch``.
    """
    from lavis_svp.common.devices import checked_device
    from lavis_svp.common.images import read_image
    from lavis_svp.common.timing import Stopwatch
    from lavis_svp.common.transfer import move_to_device
    from lavis_svp.processors.image import ImageEvalOptions, SvpImageEvalProcessor

    if image and not Path(image).is_file():  # before the model is loaded, which takes seconds
        raise FileNotFoundError(f"There is no image {image}. Name an image file; without one, a scene is drawn.")
    place = checked_device(device, "--device")
    watch = watch or Stopwatch()
    with watch.part("reading the image"):
        pixels = read_image(Path(image), max_image_pixels).pixels if image else _built_in_image()
    model = _shipped_model(place) if checkpoint is None else _trained_model(checkpoint, place)
    processor = SvpImageEvalProcessor(ImageEvalOptions(model.options.sam.side))
    with watch.part("reading the image"):
        samples = {"image": processor.resized(pixels)[None], "original_size": [pixels.shape[:2]]}
        samples = move_to_device(samples, place)
    return model, samples, pixels


def _shipped_model(device: torch.device) -> Any:
    """The model type with the weights that come with the package."""
    from omegaconf import OmegaConf

    from lavis_svp.models.svp_ris import SvpRis
    from lavis_svp.runners.project import section_with_dtypes
    from lavis_svp.zoo import shipped_file

    section = OmegaConf.load(SvpRis.default_config_path(MODEL_TYPE)).model
    print(f"Weights: {section.finetuned}, shipped with the package: {shipped_file(section.finetuned)}")
    return SvpRis.from_config(section_with_dtypes(section, device)).to(device).eval()


def _trained_model(checkpoint: Path, device: torch.device) -> Any:
    """The model of a training's checkpoint, with the configuration stored in it."""
    from lavis_svp.common.checkpoints import newest_checkpoint
    from lavis_svp.models.svp_ris import SvpRis
    from lavis_svp.runners.options import stored_project
    from lavis_svp.runners.project import section_with_dtypes, stored_config, weights_from_checkpoint

    path = newest_checkpoint(checkpoint) if checkpoint.is_dir() else checkpoint
    if path is None or not path.exists():
        raise FileNotFoundError(
            f"There is no trained checkpoint at {checkpoint}. Train one first (bash run_scripts/train.sh), name "
            "another with --checkpoint, or leave --checkpoint out for the shipped weights."
        )
    print(f"Weights: the checkpoint {path}")
    config = stored_project(stored_config(path), path)
    weights_from_checkpoint(config)
    model = SvpRis.from_config(section_with_dtypes(config.model, device)).to(device).eval()
    model.load_checkpoint(str(path))
    return model


def _built_in_image() -> np.ndarray:
    from lavis_svp.datasets.refshapes.build import make_image
    from lavis_svp.datasets.refshapes.config import RefShapesConfig

    config = RefShapesConfig()
    scene = make_image(DEMO_SEED, "test", 0, config)
    print("No image given: a RefShapes scene. True expressions of it are, for example:", file=sys.stderr)
    for expression in scene.expressions[:4]:
        print(f"  {expression.text}", file=sys.stderr)
    return scene.paint(DEMO_SEED, config)[0]
