"""``python -m lavis_svp.datasets.photos``: fetch and write the photos."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis_svp.common.paths import cache_root
from lavis_svp.datasets.photos.build import build_photos


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and make the data set."""
    parser = argparse.ArgumentParser(
        prog="python -m lavis_svp.datasets.photos",
        description="Write the test photos with their hand-written expressions in RefCOCO format.",
    )
    parser.add_argument("--root", type=Path, default=cache_root() / "data", help="data folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    print(f"The photos are in {build_photos(given.root)}")


if __name__ == "__main__":
    main()
