"""The text processor, by LAVIS's name."""

import pytest
from lavis.processors import load_processor
from omegaconf import OmegaConf


def test_cleans():
    assert load_processor("svp_referring")(" The dog [SEG]. ") == "the dog seg"


def test_empty():
    with pytest.raises(ValueError, match="empty"):
        load_processor("svp_referring")(" ")


def test_unknown_key():
    with pytest.raises(ValueError, match="'prompt' in svp_referring"):
        load_processor("svp_referring", OmegaConf.create({"name": "svp_referring", "prompt": "x"}))
