from __future__ import annotations

import pytest

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.plan.gpus import GPUS, get_gpu


def test_names_say_the_memory_and_every_number_its_source():
    for name, gpu in GPUS.items():
        assert gpu.name == name and f"{gpu.memory_gb:g}g" in name and gpu.source


def test_an_unknown_kind_is_told():
    with pytest.raises(UnknownNameError, match="a100-80g"):
        get_gpu("a100-80gb")
