"""``python -m lavis_svp.metrics``: the old name of ``lavis-svp metrics``."""

from lavis_svp.cli.metrics import main

if __name__ == "__main__":
    raise SystemExit(main())
