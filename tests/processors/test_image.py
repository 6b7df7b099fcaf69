"""The image processors, by LAVIS's names."""

import numpy as np
import pytest
import torch
from lavis.processors import load_processor
from omegaconf import OmegaConf
from PIL import Image

from lavis_svp.processors.image import ImageTrainOptions, jitter_colors
from lavis_svp.vision.geometry import sam_input_size

IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def processor(name, **options):
    return load_processor(name, OmegaConf.create({"name": name, **options}))


@pytest.mark.parametrize("name", ["svp_image_train", "svp_image_eval"])
def test_one_tensor(name, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    process = processor(name, image_size=64)
    for source in (path, str(path), Image.fromarray(IMAGE), IMAGE):
        image = process(source)
        assert image.unsqueeze(0).shape == (1, 4, 64, 64) and image.dtype == torch.float32
        assert image[3].sum() == 48 * 64
    assert load_processor(name)(IMAGE).shape == (4, 1024, 1024)


@pytest.mark.parametrize("name", ["svp_image_train", "svp_image_eval"])
@pytest.mark.parametrize("size", [(30, 40), (40, 30), (7, 90), (64, 64)])
def test_the_lean_form_holds_the_same_pixels_in_a_fifth_of_the_bytes(name, size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    process = processor(name, image_size=64)
    lean, full = process.resized(image), process(image)
    assert lean.dtype == torch.uint8 and lean.shape == (3, 64, 64)
    assert torch.equal(lean.float() / 255, full[:3])
    height, width = sam_input_size(*size, 64)
    assert full[3, :height, :width].all() and full[3].sum() == height * width  # the size follows by arithmetic
    assert not lean[:, height:].any() and not lean[:, :, width:].any()
    assert lean.numel() * 5 < full.numel() * full.element_size() + 3


def test_the_lean_form_has_the_same_changes_of_colour():
    train = processor("svp_image_train", image_size=64, contrast=0.5, saturation=0.2)
    lean = train.resized(IMAGE, rng=np.random.default_rng(3))
    assert torch.equal(lean.float() / 255, train(IMAGE, rng=np.random.default_rng(3))[:3])
    assert train.colour_changes == ["contrast", "saturation"]
    assert processor("svp_image_train", image_size=64).colour_changes == []


def test_train_without_augmentation_is_eval():
    train, evaluate = processor("svp_image_train", image_size=64), processor("svp_image_eval", image_size=64)
    assert torch.equal(train(IMAGE), evaluate(IMAGE))


def test_color_changes_repeat_and_keep_the_geometry():
    train = processor("svp_image_train", image_size=64, brightness=0.5)
    first, again, other = (train(IMAGE, rng=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[3], other[3])


@pytest.mark.parametrize("name", ["svp_image_train", "svp_image_eval"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "multiple of 16"),
        ({"image_size": "64"}, "multiple of 16"),
        ({"imagesize": 64}, "did you mean 'image_size'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        processor(name, **options)


def test_hflip_prob_is_a_probability():
    for value in (2, "often", float("nan")):
        with pytest.raises(ValueError, match="hflip_prob"):
            processor("svp_image_train", hflip_prob=value)
    assert processor("svp_image_train", hflip_prob=0.5).hflip_prob == 0.5


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match="bad.jpg"):
        processor("svp_image_eval")(tmp_path / "bad.jpg")


def test_colour_changes_are_off_by_default():
    assert jitter_colors(IMAGE, ImageTrainOptions(), np.random.default_rng(0)) is IMAGE


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_colour_change_repeats_with_its_seed(name):
    before = IMAGE.copy()
    options = ImageTrainOptions(**{name: 0.5})
    changed = [jitter_colors(IMAGE, options, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(changed[0], changed[1])
    assert (changed[0] != changed[2]).any() and (changed[0] != IMAGE).any()
    assert changed[0].shape == IMAGE.shape and changed[0].dtype == np.uint8
    np.testing.assert_array_equal(IMAGE, before)


@pytest.mark.parametrize("amount", [-0.1, 1.1])
def test_colour_changes_out_of_range(amount):
    with pytest.raises(ValueError, match="contrast"):
        ImageTrainOptions(contrast=amount)
