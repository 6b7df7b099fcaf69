"""Registers everything of this plugin with LAVIS: each module of the rooms that hold LAVIS's own kinds.

``lavis_svp.compat`` calls this when LAVIS has been imported; nobody else needs to. To add a model, a processor, a
task or a runner, put a module with LAVIS's decorator into the room: it is found.
"""

from __future__ import annotations

import importlib
import pkgutil

from lavis_svp.compat import ROOMS_ON_LAVIS


def register() -> None:
    """Import LAVIS's runners and lr schedulers, which ``import lavis`` leaves out, then all rooms of this plugin."""
    importlib.import_module("lavis.runners")
    importlib.import_module("lavis.common.optims")
    for room in ROOMS_ON_LAVIS:
        module = importlib.import_module(room)
        for entry in pkgutil.iter_modules(getattr(module, "__path__", ())):
            importlib.import_module(f"{room}.{entry.name}")
