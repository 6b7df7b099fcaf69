"""``python -m lavis_svp.datasets.leaks``: an alias of ``lavis-svp data leaks``, for this release."""

if __name__ == "__main__":
    import sys

    from lavis_svp.cli.data import main

    sys.exit(main(["leaks", *sys.argv[1:]]))
