"""Alias of ``lavis-svp segment``, the name in release 0.1."""

from lavis_svp.cli.segment import main

if __name__ == "__main__":
    main()
