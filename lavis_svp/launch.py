"""Alias of :mod:`lavis_svp.runners.project`, the name in release 0.1."""

from lavis_svp.runners.project import build_config, build_runner, dot_list, read_project, weights_from_checkpoint

__all__ = ["build_config", "build_runner", "dot_list", "read_project", "weights_from_checkpoint"]
