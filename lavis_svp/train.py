"""Alias of ``lavis-svp train``, the name in release 0.1."""

from lavis_svp.cli.train import main

if __name__ == "__main__":
    main()
