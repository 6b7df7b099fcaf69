"""``python -m lavis_svp.zoo``: the old name of ``lavis-svp zoo``."""

from lavis_svp.cli.zoo import main

if __name__ == "__main__":
    raise SystemExit(main())
