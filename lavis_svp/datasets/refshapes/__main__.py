"""``python -m lavis_svp.datasets.refshapes``: an alias of ``lavis-svp data refshapes``, for this release."""

import sys

from lavis_svp.cli.data import main

if __name__ == "__main__":
    sys.exit(main(["refshapes", *sys.argv[1:]]))
