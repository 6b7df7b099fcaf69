"""``import lavis_svp`` and the base layers stay cheap, and need neither LAVIS nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "lavis", "transformers", "numpy", "omegaconf")
BASE_LAYERS = ("projectors", "superpixels", "metrics", "common")


def modules_after(statement: str) -> tuple[set[str], float]:
    """The heavy modules that a statement loads in a fresh interpreter, and the seconds it takes."""
    code = (
        "import sys, time; start = time.perf_counter()\n"
        f"{statement}\n"
        "took = time.perf_counter() - start\n"
        f"print(took, *[name for name in {HEAVY} if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return set(output[1:]), float(output[0])


def test_the_package_imports_fast_and_alone():
    results = [modules_after("import lavis_svp") for _ in range(3)]
    assert not any(loaded for loaded, _ in results)
    assert min(seconds for _, seconds in results) < 0.3


@pytest.mark.parametrize("layer", BASE_LAYERS)
def test_a_base_layer_needs_neither_lavis_nor_transformers(layer):
    loaded, _ = modules_after(f"import lavis_svp.{layer}")
    assert not loaded & {"lavis", "transformers"}
