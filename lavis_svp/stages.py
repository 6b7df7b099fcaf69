"""Alias of ``lavis-svp stages``, the name in release 0.1."""

from lavis_svp.cli.train import stages

if __name__ == "__main__":
    stages()
