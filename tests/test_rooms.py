"""The order of the rooms: a room imports only rooms before it, and no two modules import each other in a circle.

Every import counts: at the top of a module, inside a function, and under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lavis_svp"
ROOMS = (
    "common",
    "zoo",
    "superpixels",
    "vision",
    "projectors",
    "language",
    "segmentation",
    "models",
    "metrics",
    "processors",
    "datasets",
    "tasks",
    "runners",
    "hosts",
    "plan",
    "export",
    "probes",
    "cli",
    "register",
    "compat",
)
"""register and compat come last: they know what is registered. ``import lavis_svp`` runs them before anything else."""

WITHOUT_LAVIS = ("common", "superpixels", "projectors", "metrics")
MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(("lavis_svp", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def is_alias(path: Path) -> bool:
    """``python -m lavis_svp.X`` of release 0.1: a few lines that call the command line."""
    return path.name == "__main__.py" or (path.parent == PACKAGE and path.stem not in ("__init__", "register"))


def is_main_block(node: ast.stmt) -> bool:
    """``if __name__ == "__main__":``, where a module of release 0.1 that was a command calls the command line."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Modules of the package that a module imports, anywhere in it."""
    known = {dotted(module) for module in MODULES}
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_main_block(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = dotted(path).split(".")[: -node.level + (path.name == "__init__.py") or None] if node.level else []
            base = ".".join([*parent, node.module] if node.module else parent)
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        found += [name for name in names if name.split(".")[0] == "lavis_svp"]
    return tuple(dict.fromkeys(found))


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_folder_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS) - {"register"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    wrong = [
        f"{dotted(path)} imports {name}"
        for path in MODULES
        if room_of(dotted(path)) == room and not is_alias(path)
        for name in imports(path)
        if room_of(name) in ROOMS and ROOMS.index(room_of(name)) > ROOMS.index(room)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        dotted(path): [name for name in imports(path) if name != dotted(path)] for path in MODULES if not is_alias(path)
    }
    state: dict[str, int] = {}
    circles = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 1:
            circles.append(" -> ".join((*trail[trail.index(name) :], name)))
        if name in state:
            return
        state[name] = 1
        for other in graph.get(name, ()):
            visit(other, (*trail, name))
        state[name] = 2

    for name in graph:
        visit(name, ())
    assert circles == []


@pytest.mark.parametrize("room", WITHOUT_LAVIS)
def test_the_plain_rooms_import_neither_lavis_nor_transformers(room):
    wrong = []
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{dotted(path)}: {name}" for name in names if name.split(".")[0] in ("lavis", "transformers")]
    assert wrong == []


def test_no_two_classes_share_a_name():
    seen: dict[str, str] = {}
    double = []
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                if node.name in seen:
                    double.append(f"{node.name}: {seen[node.name]} and {dotted(path)}")
                seen[node.name] = dotted(path)
    assert double == []
