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

MODEL_TYPE = "tiny_photos"  # of the shipped weights
ANSWERING = Path("output/svp/refshapes_vqa_tiny")
MAX_ANSWER_TOKENS = 60
DEMO_PHOTO, DEMO_EXPRESSIONS = "chelsea.png", ("the cat", "the left eye", "the dog")  # nothing was trained on it
DEMO_SEED = 1  # of the built-in scene of RefShapes, which no split holds


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = command_parser(
        "segment",
        "Segment what an expression names. Prints the model's answer, and writes a PNG that shows the image, its\n"
        "superpixels and the predicted mask. With --question it answers in words, which needs a checkpoint of\n"
        "projects/svp/train/refshapes_vqa_tiny.yaml.",
        'lavis-svp segment photo.jpg "the red cup" --out cup.png\n'
        '  lavis-svp segment "the large red square" --model-type tiny\n'
        '  lavis-svp segment --question "how many red circles are there?"',
    )
    add = parser.add_argument
    text = "an image file (default: a photograph, or a drawn scene for models that know only drawn shapes)"
    add("image", nargs="?", help=text)
    add("expression", help='what to segment, such as "the red circle"')
    add("--question", action="store_true", help='the text is a question; "" asks for a caption')
    text = f"a checkpoint or its folder (default: the shipped weights; with --question {ANSWERING})"
    add("--checkpoint", type=Path, metavar="FILE", help=text)
    text = "which of the shipped weights: tiny_photos, for photographs, or tiny, for RefShapes (default: %(default)s)"
    add("--model-type", default=MODEL_TYPE, metavar="TYPE", help=text)
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
            segment(
                args.image,
                args.expression,
                args.checkpoint,
                args.out,
                args.device,
                args.max_image_pixels,
                args.model_type,
            )


def segment(
    image: str | None,
    expression: str,
    checkpoint: Path | None,
    out: Path,
    device: str = "auto",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    model_type: str = MODEL_TYPE,
) -> None:
    """Predict the mask of an expression, print the answer and draw the mask.

    Args:
        image: an image file; None: the built-in one of the model.
        expression: what to segment.
        checkpoint: of a training; None: the shipped weights.
        out: the PNG to write.
        device: where the model runs.
        max_image_pixels: a larger image is refused.
        model_type: of the shipped weights.

    Raises:
        ValueError: the image, the expression or the checkpoint cannot be used.
        OSError: a file is not there, or cannot be read or written.
    """
    from lavis_svp.common.timing import Stopwatch
    from lavis_svp.common.visualization import panel, save_png
    from lavis_svp.processors.text import SvpReferringProcessor

    cleaned = SvpReferringProcessor()(expression)
    watch = Stopwatch()
    model, samples, pixels = _model_and_samples(image, checkpoint, device, max_image_pixels, watch, model_type)
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
    model_type: str = MODEL_TYPE,
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
        raise FileNotFoundError(f"There is no image {image}. Name an image file; without one, a built-in one is taken.")
    place = checked_device(device, "--device")
    watch = watch or Stopwatch()
    with watch.part("reading the image"):
        pixels = read_image(Path(image), max_image_pixels).pixels if image else None
    model = _shipped_model(place, model_type) if checkpoint is None else _trained_model(checkpoint, place)
    if pixels is None:
        pixels = _photograph() if model.options.reads_classes else _drawn_scene()
    processor = SvpImageEvalProcessor(ImageEvalOptions(model.options.sam.side))
    with watch.part("reading the image"):
        samples = {"image": processor.resized(pixels)[None], "original_size": [pixels.shape[:2]]}
        samples = move_to_device(samples, place)
    return model, samples, pixels


def _shipped_model(device: torch.device, model_type: str = MODEL_TYPE) -> Any:
    """A model type with the weights that come with the package."""
    from omegaconf import OmegaConf

    from lavis_svp.models.svp_ris import SvpRis
    from lavis_svp.runners.project import section_with_dtypes
    from lavis_svp.zoo import shipped_file
    from lavis_svp.zoo.shipped import shipped_of_type

    shipped_of_type(model_type)  # an unknown one is told before anything is loaded
    section = OmegaConf.load(SvpRis.default_config_path(model_type)).model
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


def _photograph() -> np.ndarray:
    """A photograph of scikit-image, (H, W, 3) uint8 RGB."""
    from lavis_svp.datasets.refshapes.render import load_photo

    tried = ", ".join(f'"{expression}"' for expression in DEMO_EXPRESSIONS)
    print(f"No image given: scikit-image's {DEMO_PHOTO}. Try {tried}.", file=sys.stderr)
    return load_photo(DEMO_PHOTO)


def _drawn_scene() -> np.ndarray:
    """A scene of RefShapes, (H, W, 3) uint8 RGB; what is in it goes to stderr."""
    from lavis_svp.datasets.refshapes.build import make_image
    from lavis_svp.datasets.refshapes.config import RefShapesConfig

    config = RefShapesConfig()
    scene = make_image(DEMO_SEED, "test", 0, config)
    print("No image given: a RefShapes scene. True expressions of it are, for example:", file=sys.stderr)
    for expression in scene.expressions[:4]:
        print(f"  {expression.text}", file=sys.stderr)
    return scene.paint(DEMO_SEED, config)[0]
