"""What docs/encoders.md says is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lavis_svp.encoders.families import FAMILIES
from lavis_svp.models.options import parse_model_options
from lavis_svp.projectors.base import ENCODER_OUTPUTS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")


def test_the_yaml_of_the_docs_is_read():
    found = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    encoder = parse_model_options(yaml.safe_load(found.group(1))["model"]).vision_encoder
    assert (encoder.name, encoder.side, encoder.levels) == ("facebook/dinov2-large", 336, ())


def test_every_family_and_every_output_is_told():
    rows = [line.split("|") for line in TEXT.splitlines() if line.startswith("| ")]
    kinds = {kind for row in rows if len(row) == 9 for kind in re.findall(r"`(\w+)`", row[2])} - {"model_type"}
    assert kinds == set(FAMILIES)
    assert {name for row in rows if len(row) == 5 for name in re.findall(r"`(\w+)`", row[1])} == ENCODER_OUTPUTS
