"""``python -m lavis_svp.plan``: the old name of ``lavis-svp plan``."""

from lavis_svp.cli.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
