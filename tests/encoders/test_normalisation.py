"""Weights are fed the colours that they were trained with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lavis_svp.encoders.families import FAMILIES
from lavis_svp.encoders.normalisation import with_own_colours
from lavis_svp.encoders.vision import build_vision_encoder


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_without_a_file_the_familys(kind, tmp_path):
    assert with_own_colours(FAMILIES[kind], tmp_path) is FAMILIES[kind]


def test_openclips_folder_says_its_own(tmp_path, vision_folders):
    """As laion/CLIP-ViT-L-14-laion2B-s32B-b82K, which was trained with half the range, not with CLIP's colours."""
    folder = shutil.copytree(vision_folders["clip"], tmp_path / "openclip")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    encoder = build_vision_encoder(folder, 56)
    framed = encoder.frame(torch.full((1, 3, 56, 56), 0.75), [(56, 56)])
    torch.testing.assert_close(framed, torch.ones_like(framed))


def test_a_file_may_name_one_alone(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    family = with_own_colours(FAMILIES["clip"], tmp_path)
    assert family.mean == (0.1, 0.2, 0.3) and family.std == FAMILIES["clip"].std


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"image_mean": 0.5}', '{"image_std": [0.5, 0.5]}', '{"image_mean": ["a"]}']
)
def test_a_damaged_file_is_told(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match="preprocessor_config.json does not say how to normalise"):
        with_own_colours(FAMILIES["clip"], tmp_path)
