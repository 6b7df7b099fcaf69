"""Registers this plugin's models, processors, data sets, tasks and runners with LAVIS by importing their modules.

``lavis_svp.compat`` calls this when LAVIS has been imported; nobody else needs to. To add a model, a processor, a
task or a runner, put a module with LAVIS's decorator into that package: it is found. Projectors are no kind that LAVIS
knows: ``lavis_svp/projectors/__init__.py`` imports each of them by name.
"""

from __future__ import annotations

import importlib
import pkgutil

LAVIS_PACKAGES = (
    "lavis_svp.models",
    "lavis_svp.processors",
    "lavis_svp.datasets.builders",
    "lavis_svp.datasets.answering_builders",
    "lavis_svp.tasks",
    "lavis_svp.runners",
    "lavis_svp.hosts.blip2",
)
"""Packages and modules that register with LAVIS. LAVIS is imported before any of them."""


def register() -> None:
    """Import LAVIS's runners and schedulers, which ``import lavis`` leaves out, then all packages of this plugin."""
    importlib.import_module("lavis.runners")
    importlib.import_module("lavis.common.optims")
    for package in LAVIS_PACKAGES:
        module = importlib.import_module(package)
        for entry in pkgutil.iter_modules(getattr(module, "__path__", ())):
            importlib.import_module(f"{package}.{entry.name}")
