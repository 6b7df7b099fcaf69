"""Makes the checks of every projector importable in these tests: ``from projector_checks import CHECKS``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "projector_checks" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("projector_checks", Path(__file__).with_name("projector_checks.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
