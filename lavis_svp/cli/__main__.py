"""``python -m lavis_svp.cli``: the command ``lavis-svp``, which launchers of several processes start as a module."""

from lavis_svp.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
