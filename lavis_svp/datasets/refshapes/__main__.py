"""``python -m lavis_svp.datasets.refshapes``: make RefShapes."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.refshapes.build import DEFAULT_SIZES, build_refshapes


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and make the data set."""
    parser = argparse.ArgumentParser(
        prog="python -m lavis_svp.datasets.refshapes",
        description="Draw the built-in data set RefShapes and write it in RefCOCO format.",
    )
    parser.add_argument("--root", type=Path, default=cache_root() / "data", help="data folder (default: %(default)s)")
    for split, count in DEFAULT_SIZES.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"number of {split} images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images (%(default)s)")
    given = parser.parse_args(arguments)
    sizes = {split: getattr(given, split) for split in DEFAULT_SIZES}
    print(f"RefShapes is in {build_refshapes(given.root, sizes, given.seed)}")


if __name__ == "__main__":
    main()
