"""``python -m lavis_svp.datasets.shards``: an alias of ``lavis-svp data shards``, for this release."""

import sys

from lavis_svp.cli.data import main

if __name__ == "__main__":
    sys.exit(main(["shards", *sys.argv[1:]]))
