"""What is packaged, and that pins, bounds and the environment agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def pins(name: str) -> dict[str, str]:
    """Package name -> exact version, of one requirements file."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith(("#", "-c ")):
            package, separator, number = line.partition("==")
            assert separator, f"{name}: '{line}' is not an exact pin"
            found[canonicalize_name(package)] = number
    return found


DIRECT = {**pins("requirements.txt"), **pins("requirements-dev.txt"), **pins("requirements-lavis.txt")}
BOUNDS = [Requirement(line) for line in requires("lavis-svp") or []]
# Dependencies that neither lavis_svp nor LAVIS imports -> the module that does.
IMPORTED_BY = {
    "tensorboard": "torch.utils.tensorboard",
    "torchvision": "segment_anything.automatic_mask_generator",
}


def test_environment_holds_the_pins() -> None:
    assert {name: version(name) for name in DIRECT} == DIRECT


APART = ("bitsandbytes",)
"""Installed by who needs it: transformers imports it wherever it is, which takes time and prints a line."""


def test_constraints_hold_only_what_is_pulled_in() -> None:
    constraints = pins("constraints.txt")
    assert not set(constraints) & set(DIRECT), "pinned twice"
    assert {name: version(name) for name in constraints} == constraints


@pytest.mark.parametrize("bound", [bound for bound in BOUNDS if bound.name not in APART], ids=str)
def test_bounds_admit_the_pins(bound: Requirement) -> None:
    pinned = DIRECT[canonicalize_name(bound.name)]
    assert any(clause.operator == ">=" for clause in bound.specifier), "run_scripts/test_lower_bounds.sh needs a bound"
    assert bound.specifier.contains(pinned), f"setup.py asks for {bound}, requirements.txt pins {pinned}"


def test_lavis_is_not_a_dependency_of_the_package() -> None:
    assert BOUNDS
    assert "salesforce-lavis" not in {canonicalize_name(bound.name) for bound in BOUNDS}


def test_only_lavis_disagrees_with_its_surroundings() -> None:
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    complaints = [line for line in result.stdout.splitlines() if not line.startswith("salesforce-lavis ")]
    assert complaints in ([], ["No broken requirements found."])


def test_package_holds_all_of_lavis_svp_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}", "build", f"-b{tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    packaged = tmp_path / "lib"
    assert [path.name for path in packaged.iterdir()] == ["lavis_svp"]
    wanted = {".py", ".yaml", ".json"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "lavis_svp").rglob("*") if path.suffix in wanted}
    sources |= {path.relative_to(ROOT) for path in (ROOT / "lavis_svp/weights").iterdir()}
    for name in ("svp_ris_tiny", "one_pass_mobile_sam"):
        assert Path(f"lavis_svp/weights/{name}.safetensors") in sources
    assert {path.relative_to(packaged) for path in packaged.rglob("*") if path.is_file()} == sources


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "lavis_svp").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def imported_packages() -> dict[str, Path]:
    """Top-level name of each import in lavis_svp, lazy ones included -> a file that has it."""
    found = {}
    for path in (ROOT / "lavis_svp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update({alias.name.split(".")[0]: path for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[node.module.split(".")[0]] = path
    return found


def test_every_import_is_declared() -> None:
    distributions = packages_distributions()
    declared = {canonicalize_name(bound.name) for bound in BOUNDS} | {"salesforce-lavis", "lavis-svp"}
    for name, path in imported_packages().items():
        if name not in sys.stdlib_module_names and name != "lavis_svp":
            owners = {canonicalize_name(owner) for owner in distributions.get(name, [])}
            where = path.relative_to(ROOT)
            assert owners & set(DIRECT), f"{where} imports {name} ({owners}), which requirements.txt does not pin"
            assert owners & declared, f"{where} imports {name} ({owners}), which setup.py does not declare"


def files_that_may_use_dependencies() -> Iterator[Path]:
    lavis = find_spec("lavis")
    assert lavis is not None and lavis.origin is not None
    yield from (ROOT / "lavis_svp").rglob("*.py")
    yield from Path(lavis.origin).parent.rglob("*.py")
    for module in IMPORTED_BY.values():
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        yield Path(spec.origin)


def test_every_dependency_is_imported() -> None:
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    files = files_that_may_use_dependencies()
    names = {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}
    distributions = packages_distributions()
    used = {canonicalize_name(owner) for name in names for owner in distributions.get(name, [])}
    declared = {bound for bound in BOUNDS if "dev" not in str(bound.marker) and bound.name not in APART}
    assert {str(bound) for bound in declared if canonicalize_name(bound.name) not in used} == set()


def test_versions_agree() -> None:
    import lavis_svp

    assert lavis_svp.__version__ == version("lavis-svp")
