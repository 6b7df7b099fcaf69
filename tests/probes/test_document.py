"""docs/probes.md says what the stored results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("probes", ROOT / "benchmarks/probes.py")
probes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(probes)


def test_the_documents_tables_are_made_from_the_files():
    assert probes.DOCUMENT.read_text() == probes.document()


@pytest.mark.parametrize("name", probes.FORMATS)
def test_results_are_of_the_shipped_model_and_name_no_machine(name):
    text = probes.block(name)
    assert "svp_ris_tiny" in text and f"probe {name} " in text and "/work" not in text and "/home" not in text
