"""The import hook that adapts LAVIS and registers the plugin whenever LAVIS gets imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

INSTALL_LAVIS = "pip install --no-deps salesforce-lavis==1.0.2"
# Packages whose modules register with LAVIS: LAVIS is imported before any of them.
ROOMS_ON_LAVIS = (
    "lavis_svp.models",
    "lavis_svp.processors",
    "lavis_svp.datasets.builders",
    "lavis_svp.datasets.answering_builders",
    "lavis_svp.tasks",
    "lavis_svp.runners",
    "lavis_svp.hosts.blip2",
)


def install() -> None:
    """Arrange that LAVIS and this plugin know each other, whichever is imported first."""
    if not any(isinstance(finder, LavisFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LavisFinder())
    if "lavis" in sys.modules:
        adapt_lavis()


class LavisFinder(MetaPathFinder):
    """Finds ``lavis`` and the rooms that need it as usual, but wraps their loaders."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module (see :class:`importlib.abc.MetaPathFinder`).

        Raises:
            ModuleNotFoundError: LAVIS is not installed; the message names the command that installs it.
        """
        if fullname != "lavis" and fullname not in ROOMS_ON_LAVIS:
            return None
        spec = self._ask_others(fullname, path, target)
        if spec is None and fullname == "lavis":
            raise ModuleNotFoundError(
                f"LAVIS is not installed. It pins a transformers that is too old, so install it alone, after "
                f"lavis-svp's own requirements: {INSTALL_LAVIS}",
                name="lavis",
            )
        if spec is not None and spec.loader is not None:
            wrap = LavisLoader if fullname == "lavis" else RoomLoader
            spec.loader = wrap(spec.loader)
        return spec

    def _ask_others(self, fullname: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                return spec
        return None


class _WrappedLoader(Loader):
    """A loader that does something around another one."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source, get_code, resource readers...


class LavisLoader(_WrappedLoader):
    """Loads LAVIS between the two halves of this module."""

    def exec_module(self, module: ModuleType) -> None:
        """Restore transformers' moved names, load LAVIS, adapt it and register the plugin."""
        from lavis_svp.compat.runtime import load_opencv_before_decord
        from lavis_svp.compat.transformers_names import restore_moved_names

        load_opencv_before_decord()
        restore_moved_names()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # LAVIS uses names that timm announces as going away
                self._loader.exec_module(module)
        except ModuleNotFoundError as error:
            error.add_note(f"LAVIS needs '{error.name}', which is not installed: pip install -r requirements.txt")
            raise
        adapt_lavis()


class RoomLoader(_WrappedLoader):
    """Loads a room of the plugin after LAVIS."""

    def exec_module(self, module: ModuleType) -> None:
        """Import LAVIS (which registers all rooms), then load the room."""
        importlib.import_module("lavis")
        self._loader.exec_module(module)


def adapt_lavis() -> None:
    """Mend LAVIS where it needs it, then register this plugin with it."""
    from lavis_svp.compat import names, runners, runtime, transformers_names
    from lavis_svp.register import register

    transformers_names.restore_generate()
    names.patch_registry_errors()
    names.show_registered_names()
    names.set_cache_root()
    runtime.run_without_cuda()
    runtime.patch_init_distributed()
    runtime.patch_output_dir()
    runners.patch_optimizer_groups()
    runners.mix_by_ratio()
    register()
