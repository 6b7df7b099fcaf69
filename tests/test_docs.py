"""The pages of the repository: their links lead somewhere, their commands are understood, old names have an entry."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import pkgutil
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import lavis_svp
from lavis_svp.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks/reports").glob("*.md")),
    ROOT / "projects/svp/README.md",
    ROOT / "lavis_svp/weights/README.md",
]
USER_PAGES = [page for page in PAGES if page.parent.name != "reports" and page.name != "CHANGELOG.md"]
MIGRATING = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
FOLDERS = ("projects/", "run_scripts/", "benchmarks/")
NESTED = ("data", "superpixels", "export", "zoo")
"""Commands whose next word is a sub-command of their own."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        if place.startswith(("http:", "https:", "mailto:")):
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_there_are_at_most_ten_pages_and_each_says_what_it_is_for():
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert len(pages) <= 10
    openings = {page.name: page.read_text(encoding="utf-8").split("\n\n")[1] for page in pages}
    assert [name for name, opening in openings.items() if not opening.startswith("After this page you can ")] == []


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, a line each."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_shown_commands_are_understood(page):
    """Files exist, sub-commands are known, and so are their options; old forms of commands are not shown."""
    problems = []
    for line in commands(page):
        words = shlex.split(line, comments=True)
        problems += [f"{word} is no file" for word in words if word.startswith(FOLDERS) and not (ROOT / word).is_file()]
        if re.search(r"(-m|--module) lavis_svp\b(?!\.cli\b)", line):
            problems.append(f"an old form: {line}")
        start = next((index for index, word in enumerate(words) if word.endswith("lavis-svp")), len(words))
        if start == len(words):
            continue
        name, *rest = words[start + 1 :]
        depth = 2 if [name, *rest[:1]] == ["data", "shards"] else int(name in NESTED)
        known = shown_options(name, *rest[:depth])
        if not known:
            problems.append(f"no such command: {line}")
        given = {word.partition("=")[0] for word in rest if word.startswith("--")}
        problems += [f"{word} is no option: {line}" for word in given - known if known]
    assert not problems


@functools.cache
def shown_options(*command: str) -> set[str]:
    """The options in a command's help; none if there is no such command."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main([*command, "--help"])
        except SystemExit as end:
            code = end.code
    options = set(re.findall(r"--[a-z][\w-]*", shown.getvalue())) if code == 0 else set()
    return options | (shown_options("train") if command == ("stages",) else set())  # which it passes on


def option_classes() -> list[type]:
    """Every options dataclass that has keys of an earlier release."""
    for module in pkgutil.walk_packages(lavis_svp.__path__, "lavis_svp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, todo = [], [object]
    while todo:
        for cls in type.__subclasses__(todo.pop()):
            todo.append(cls)
            own = vars(cls).keys() & {"RENAMED_KEYS", "REMOVED_KEYS", "VALUE_SPELLINGS"}
            if own and cls.__module__.startswith("lavis_svp.") and dataclasses.is_dataclass(cls):
                found.append(cls)
    return sorted(set(found), key=lambda cls: cls.__qualname__)


def rows() -> list[list[set[str]]]:
    """The migration page's table rows: the code spans of each cell."""
    lines = [line for line in MIGRATING.splitlines() if line.startswith("|")]
    return [[set(re.findall(r"`([^`]+)`", cell)) for cell in line.strip("|").split(" | ")] for line in lines]


def holds(cell: set[str], key: str) -> bool:
    return any(span == key or span.endswith(f".{key}") for span in cell)


def test_every_old_yaml_key_has_its_row():
    classes = option_classes()
    assert len(classes) >= 8
    missing = []
    for cls in classes:
        for old, new in getattr(cls, "RENAMED_KEYS", {}).items():
            if not any(holds(row[0], old) and holds(row[1], new) for row in rows()):
                missing.append(f"{cls.__name__}: {old} -> {new}")
        for key, neutral in getattr(cls, "REMOVED_KEYS", {}).items():
            if not any(holds(row[0], key) and str(neutral) in row[1] for row in rows()):
                missing.append(f"{cls.__name__}: {key} (harmless: {neutral})")
        for key, spellings in getattr(cls, "VALUE_SPELLINGS", {}).items():
            for old, new in spellings.items():
                if not any(holds(row[0], key) and str(old) in row[1] and new in row[-1] for row in rows()):
                    missing.append(f"{cls.__name__}: {key}: {old} -> {new}")
    assert not missing, "docs/migrating.md lacks " + "; ".join(missing)


def test_the_new_places_of_the_migration_page_exist():
    section = MIGRATING.split("## Python imports")[1]
    tables = section.split("## Classes and functions")
    for line in tables[0].splitlines():
        if line.startswith("| `lavis_svp."):
            base = ""
            for span in re.findall(r"`([\w.]+)`", line.split(" | ")[1]):
                name = span if span.startswith("lavis_svp") else f"{base}{span}" if span.startswith(".") else ""
                base = name.rpartition(".")[0]
                assert not name or find_spec(name), f"{name}, in: {line}"
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lavis_svp").rglob("*.py"))
    for line in tables[1].splitlines():
        if line.startswith("| `"):
            for span in re.findall(r"`(\w+)`", line.split(" | ")[1]):
                known = rf"(class|def) {span}\b|^{span}\b.*=|^ +{span}: "
                assert re.search(known, source, re.MULTILINE), f"{span}, in: {line}"
