"""``python -m lavis_svp.projectors``: the old name of ``lavis-svp projectors``."""

from lavis_svp.cli.projectors import main

if __name__ == "__main__":
    raise SystemExit(main())
