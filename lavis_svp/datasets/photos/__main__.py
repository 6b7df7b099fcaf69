"""``python -m lavis_svp.datasets.photos``: an alias of ``lavis-svp data photos``, for this release."""

import sys

from lavis_svp.cli.data import main

if __name__ == "__main__":
    sys.exit(main(["photos", *sys.argv[1:]]))
