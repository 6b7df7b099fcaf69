"""What the feature extractor reads of a batch: what is refused, and how it is named."""

import pytest
import torch


def test_a_tensor_that_the_processors_did_not_make_is_refused(make_extractor):
    with pytest.raises(ValueError, match="image_size 128"):
        make_extractor()({"image": torch.zeros(1, 4, 64, 64)})


def test_cached_features_of_another_form_are_named(make_extractor):
    extractor = make_extractor(superpixels=None)
    whole = {name: torch.zeros(shape) for name, shape in extractor.feature_layout().items()}
    sizes = [(96, 128)] * 2
    for name in whole:
        part = {key: tensor for key, tensor in whole.items() if key != name}
        with pytest.raises(ValueError, match=f"The projector needs {name}, which the cached features lack"):
            extractor.read_images({"frozen": [whole, part], "original_size": sizes})
        with pytest.raises(ValueError, match=f"{name} of different shapes"):
            extractor.read_images({"frozen": [whole, {**part, name: whole[name][:1]}], "original_size": sizes})
