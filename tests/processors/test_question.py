"""The processor of questions, by LAVIS's name."""

import pytest
from lavis.processors import load_processor
from omegaconf import OmegaConf


def test_cleans():
    assert load_processor("svp_question")(" How many [SEG]? ") == "How many SEG ?"


def test_unknown_key():
    with pytest.raises(ValueError, match="'prompt' in svp_question"):
        load_processor("svp_question", OmegaConf.create({"name": "svp_question", "prompt": "x"}))
