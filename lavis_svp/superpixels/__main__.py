"""``python -m lavis_svp.superpixels``: the same as ``lavis-svp superpixels``."""

from lavis_svp.cli.superpixels import main

if __name__ == "__main__":
    raise SystemExit(main())
