"""Superpixels in the channels of an image: what is written is read, in half precision too."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_svp.hosts.label_channels import label_channels, read_channels, with_channels
from lavis_svp.projectors import PatchFeatures, Superpixels


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 1))
def test_what_is_written_is_read(seed, dtype, edge):
    """More labels than half precision can count, at a size with an edge that fills no patch."""
    draw = np.random.default_rng(seed)
    labels = draw.choice([-1, 0, 1, 127, 128, 300, 16000], (12, 8))
    padding = np.zeros((12, 8), bool)
    padding[8:] = True
    channels = label_channels(labels, (12, 8), padding)
    image = torch.nn.functional.pad(torch.cat([torch.rand(3, 12, 8), channels]), (0, edge, 0, edge)).to(dtype)
    features = PatchFeatures.whole(torch.zeros(1, 6, 2), (3, 2))
    made, superpixels = read_channels(image[None], features, mask_size=(3, 2))
    assert made.valid[0].tolist() == [True] * 4 + [False] * 2
    real = [label for label in np.unique(labels[:8]) if label >= 0]
    masks = torch.stack([torch.from_numpy((labels == label) & ~padding) for label in real])
    wanted = Superpixels.from_masks([masks], [(3, 2)], mask_size=(3, 2))
    assert torch.equal(superpixels.weights, wanted.weights) and torch.equal(superpixels.masks, wanted.masks)


def test_another_resolution_and_images_without_superpixels():
    channels = label_channels(np.array([[0, 1]]), (2, 4))
    assert channels[0].tolist() == [[2, 2, 3, 3]] * 2 and not channels[1].any()
    plain = with_channels(torch.rand(3, 2, 4))
    assert plain.shape == (5, 2, 4) and with_channels(plain) is plain
    images = torch.stack([torch.cat([plain[:3], channels]), plain])
    features, superpixels = read_channels(images, PatchFeatures.whole(torch.zeros(2, 2, 1), (1, 2)), None)
    assert features.valid.all() and superpixels.valid.tolist() == [[True, True], [False, False]]
    assert superpixels.weights[0].tolist() == [[1, 0], [0, 1]]


def test_what_is_wrong():
    with pytest.raises(ValueError, match="At most 16382 superpixels.*got 16383"):
        label_channels(np.array([[16382]]), (1, 1))
    with pytest.raises(ValueError, match="got 4"):
        with_channels(torch.zeros(4, 2, 2))
