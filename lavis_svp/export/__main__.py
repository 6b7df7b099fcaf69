"""``python -m lavis_svp.export``: the old name of ``lavis-svp export``."""

from lavis_svp.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
