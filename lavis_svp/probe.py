"""``python -m lavis_svp.probe``: the old name of ``lavis-svp probe``."""

from lavis_svp.cli.probe import main

if __name__ == "__main__":
    raise SystemExit(main())
