"""The import hook that adapts LAVIS and registers the plugin whenever LAVIS gets imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lavis_svp.register import LAVIS_PACKAGES, register

INSTALL_LAVIS = "pip install --no-deps salesforce-lavis==1.0.2"


def install() -> None:
    """Install the import hook, so that LAVIS and this plugin know each other whichever is imported first."""
    if not any(isinstance(finder, LavisFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LavisFinder())
    if "lavis" in sys.modules:
        adapt_lavis()


class LavisFinder(MetaPathFinder):
    """Finds ``lavis`` and the packages that need it where they are, but wraps their loaders."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module; a ModuleNotFoundError names the command that installs LAVIS."""
        if fullname != "lavis" and fullname not in LAVIS_PACKAGES:
            return None
        finders = [
            find for finder in sys.meta_path if finder is not self and (find := getattr(finder, "find_spec", None))
        ]
        spec = next(filter(None, (find(fullname, path, target) for find in finders)), None)
        if spec is None and fullname == "lavis":
            raise ModuleNotFoundError(
                f"LAVIS is not installed. It pins a transformers that is too old, so install it alone, after "
                f"lavis-svp's own requirements: {INSTALL_LAVIS}",
                name="lavis",
            )
        if spec is not None and spec.loader is not None:
            wrap = LavisLoader if fullname == "lavis" else PackageLoader
            spec.loader = wrap(spec.loader)
        return spec


class _WrappedLoader(Loader):
    """A loader that does something around another one."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source, get_code, resource readers...


class LavisLoader(_WrappedLoader):
    """Loads LAVIS between the patches that go before it and those that go after it."""

    def exec_module(self, module: ModuleType) -> None:
        """Restore transformers' moved names, load LAVIS, adapt it and register the plugin."""
        from lavis_svp.compat.patches import load_opencv_before_decord, restore_moved_names

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


class PackageLoader(_WrappedLoader):
    """Loads a package of this plugin after LAVIS."""

    def exec_module(self, module: ModuleType) -> None:
        """Import LAVIS first, if that has not begun; its import registers all packages, so this one is loaded there."""
        if "lavis" not in sys.modules:
            del sys.modules[module.__name__]  # what registers must not meet it half loaded
            importlib.import_module("lavis")
        if sys.modules.setdefault(module.__name__, module) is module:
            self._loader.exec_module(module)


def adapt_lavis() -> None:
    """Patch LAVIS where it needs it, then register this plugin with it."""
    from lavis_svp.compat.patches import patch_lavis

    patch_lavis()
    register()
