"""``python -m lavis_svp.superpixels``: draw the superpixels of a picture, say how many and how much they cover."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageOps
from skimage.segmentation import find_boundaries

from lavis_svp.superpixels import RegionMap, build_superpixels, list_superpixels

BORDER_COLOUR = (255, 255, 0)


def draw_borders(picture: np.ndarray, regions: RegionMap) -> np.ndarray:
    """The picture with the inner borders of its regions on it, (H, W, 3) uint8."""
    labels = regions.resized((picture.shape[0], picture.shape[1])).labels
    borders = find_boundaries(labels, mode="inner", background=-1)  # (H, W)
    return np.where(borders[..., None], np.array(BORDER_COLOUR, np.uint8), picture)  # (H, W, 3)


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m lavis_svp.superpixels", description=__doc__)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--generator", default="felzenszwalb", choices=[n for n in list_superpixels() if n != "sam"])
    parser.add_argument("--out", type=Path, required=True, help="the picture with region borders (PNG, JPEG…)")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(arguments)
    try:
        generator = build_superpixels(args.generator, **parse_options(args.options))
        with Image.open(args.image) as image:
            picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    regions = generator([picture])[0]
    Image.fromarray(draw_borders(picture, regions)).save(args.out)
    print(f"{regions.count} superpixels cover {regions.coverage():.1%} of {args.image}; drawn in {args.out}")


if __name__ == "__main__":
    main()
