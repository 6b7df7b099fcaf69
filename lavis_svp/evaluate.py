"""Alias of ``lavis-svp evaluate``, the name in release 0.1."""

from lavis_svp.cli.evaluate import main

if __name__ == "__main__":
    main()
