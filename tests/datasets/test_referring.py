"""The data set: every expression once, masks that fit, draws that repeat, samples as the model takes them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_svp.common.images import BadImageError
from lavis_svp.common.options import SetupError
from lavis_svp.datasets.layout import annotation_files, find_images
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.sources import ANY_SIZE, BadAnnotationError, DataSource, ImageFolder
from lavis_svp.processors.text import clean_expression
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.vision.geometry import resize_to_sam_input, sam_input_size, to_sam_input


class Frame:
    """A vis_processor that mirrors with a probability."""

    def __init__(self, hflip_prob):
        self.hflip_prob = hflip_prob

    def __call__(self, image):
        raise AssertionError("a processor with `resized` is not called")

    def resized(self, image, rng=None):
        return resize_to_sam_input(image, 32)


def make(root, splits=("train",), train=False, name="refcoco", hflip_prob=0.0, **options):
    files = annotation_files(root, name)
    images = find_images(root, name, "COCO_train2014_000000000007.jpg")
    return ReferringDataset(
        DataSource(RefCOCO(files.instances, files.refs), ImageFolder(images)),
        splits,
        train,
        vis_processor=Frame(hflip_prob),
        text_processor=clean_expression,
        options=SamplingOptions(**options),
    )


def test_sample(refcoco_root):
    dataset = make(refcoco_root, instances=True)
    assert len(dataset) == 2
    sample = dataset[1]
    assert sample["image_id"] == 7 and sample["file_name"] == "COCO_train2014_000000000007.jpg"
    assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.uint8
    assert sample["original_size"] == (40, 60) and len(sample["image_key"]) == 64
    assert sample["text_input"] == ["the cat", "left cat", "animal left of the dog", "brown dog", "dog on the right"]
    assert sample["expression_ids"] == ["4-10", "4-11", "4-12", "12-30", "12-31"]
    assert sample["kinds"] == ["expression"] * 5 and sample["has_target"] == [True] * 5
    assert sample["candidates"] is None and sample["split"] == "train"
    assert all(mask.dtype == np.uint8 and mask.shape == (40, 60) and mask.max() == 1 for mask in sample["masks"])
    assert not (sample["masks"][0] & sample["masks"][3]).any()
    assert "region_map" not in sample and "frozen" not in sample


def test_instances_small_over_large(refcoco_root):
    found = make(refcoco_root, instances=True)[1]["instances"]
    assert found["words"] == [["cat"], ["hot", "dog", "brown"], ["person"], ["person"]]
    assert found["labels"].dtype == np.int32 and found["labels"].shape == (40, 60)
    assert found["labels"][10, 45] == 1 and found["labels"][35, 0] == 2 and found["labels"][0, 0] == -1
    assert make(refcoco_root)[1]["instances"] is None


def test_smaller_instance_stays_visible(tmp_path, handmade):
    content = handmade.instances()
    content["annotations"][0]["segmentation"] = handmade.rle(handmade.block(0, 0, 40, 60))  # the dog covers all
    handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p", content)
    handmade.write_train2014(tmp_path)
    labels = make(tmp_path, instances=True)[1]["instances"]["labels"]
    assert labels[10, 10] == 0 and labels[0, 0] == 1 and labels[35, 5] == 2


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_evaluation_has_every_expression_once(refcoco_root, most):
    dataset = make(refcoco_root, max_expressions=most)
    samples = [dataset[i] for i in range(len(dataset))]
    ids = [one for sample in samples for one in sample["expression_ids"]]
    assert sorted(ids) == sorted(["4-10", "4-11", "4-12", "12-30", "12-31", "5-20"])
    assert ids == dataset.expression_ids()
    assert all(1 <= len(sample["text_input"]) <= most for sample in samples)


def test_glamm3_draws_three_with_a_seed(refcoco_root):
    drawn = [make(refcoco_root, protocol="glamm3", seed=seed).expression_ids() for seed in range(6)]
    assert all(len(ids) == 4 for ids in drawn)  # three of five, and the only one of the other image
    assert drawn[0] == make(refcoco_root, protocol="glamm3", seed=0).expression_ids()
    assert len({tuple(ids) for ids in drawn}) > 1


def test_training_draws_depend_on_seed_epoch_and_index_only(refcoco_root):
    dataset = make(refcoco_root, train=True, expressions_per_image=2)
    first = dataset[1]["expression_ids"]
    assert len(first) == 2 and len(set(first)) == 2
    assert make(refcoco_root, train=True, expressions_per_image=2)[1]["expression_ids"] == first
    drawn = set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        drawn.add(tuple(dataset[1]["expression_ids"]))
    assert len(drawn) > 1
    dataset.set_epoch(0)
    assert dataset[1]["expression_ids"] == first


def test_workers_give_what_the_main_process_gives(refcoco_root):
    dataset = make(refcoco_root, train=True, expressions_per_image=2)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=lambda batch: batch)
    (batch,) = list(loader)
    assert [sample["expression_ids"] for sample in batch] == [dataset[i]["expression_ids"] for i in range(2)]


def test_several_splits_follow_each_other(refcoco_root):
    dataset = make(refcoco_root, splits=("testA", "testB"))
    assert [dataset[i]["split"] for i in range(2)] == ["testA", "testB"]
    assert dataset[1]["masks"][0].sum() == 150 and dataset[1]["has_target"] == [True]


def test_mirroring(refcoco_root):
    plain = make(refcoco_root, train=True, expressions_per_image=5, instances=True)[1]
    mirrored = make(refcoco_root, train=True, expressions_per_image=5, instances=True, hflip_prob=1.0)[1]
    assert mirrored["image_key"] == plain["image_key"] + "-mirrored"
    texts = dict(zip(mirrored["expression_ids"], mirrored["text_input"], strict=True))
    assert texts["12-31"] == "dog on the left" and texts["4-12"] == "animal right of the dog"
    masks = dict(zip(mirrored["expression_ids"], mirrored["masks"], strict=True))
    for name, mask in zip(plain["expression_ids"], plain["masks"], strict=True):
        np.testing.assert_array_equal(masks[name], mask[:, ::-1])
    np.testing.assert_array_equal(mirrored["instances"]["labels"], plain["instances"]["labels"][:, ::-1])
    height, width = sam_input_size(*plain["original_size"], 32)
    assert (plain["image"][:, height:] == 0).all() and (mirrored["image"][:, height:] == 0).all()
    torch.testing.assert_close(
        mirrored["image"][:, :, :width].float(), plain["image"][:, :, :width].flip(-1).float(), atol=2, rtol=0
    )


def test_the_superpixels_of_a_mirrored_image_are_its_originals_mirrored(refcoco_root):
    """The lookup knows originals alone: a store holds no mirrored images."""

    class Halves:
        def __init__(self):
            self.keys = set()

        def get(self, key, image):
            self.keys.add(key)
            labels = np.zeros(image.shape[:2], np.int32)
            labels[: image.shape[0] // 2, : image.shape[1] // 3] = 1
            return RegionMap.from_labels(labels, levels=[0, 2], scores=[0.25, 0.5])

    samples = []
    for hflip_prob in (0.0, 1.0):
        dataset = make(refcoco_root, train=True, hflip_prob=hflip_prob)
        assert dataset.mirrors == bool(hflip_prob)
        dataset.superpixel_cache = Halves()
        samples.append(dataset[1])
        assert dataset.superpixel_cache.keys == {samples[0]["image_key"]}
    plain, mirrored = (sample["region_map"] for sample in samples)
    assert "mirrored" in samples[1]["image_key"]
    for index in range(plain.count):
        mask = plain.masks()[index][:, ::-1]
        twin = int(mirrored.labels[mask][0])
        np.testing.assert_array_equal(mirrored.masks()[twin], mask)
        assert (plain.levels[index], plain.scores[index]) == (mirrored.levels[twin], mirrored.scores[twin])


def test_a_processor_without_the_lean_form_is_called(refcoco_root):
    dataset = make(refcoco_root)
    dataset.vis_processor = lambda image: to_sam_input(image, 32)
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 4, 32, 32) and batch["image"].dtype == torch.float32


def test_evaluation_never_mirrors(refcoco_root):
    assert "mirrored" not in make(refcoco_root, hflip_prob=1.0)[0]["image_key"]


def test_a_sentence_that_cannot_be_mirrored_keeps_its_image(tmp_path, handmade):
    refs = [handmade.ref(1, handmade.DOG, 7, "train", "dog at 3 o'clock")]
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    handmade.write_train2014(tmp_path)
    assert "mirrored" not in make(tmp_path, train=True, hflip_prob=1.0)[0]["image_key"]


def test_collater(refcoco_root):
    dataset = make(refcoco_root)
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 32, 32)
    assert all(isinstance(value, list) and len(value) == 2 for key, value in batch.items() if key != "image")
    some = dataset.collater([dataset[0] | {"frozen": {}}, dataset[1]])
    assert "frozen" not in some


class Frozen:
    """A frozen cache that has what it is given."""

    def __init__(self, stored):
        self.stored = stored

    def get(self, image_key, image):
        assert image.dtype == np.uint8 and image.ndim == 3
        return self.stored.get(image_key)


class Superpixels:
    """A superpixel cache that makes one region."""

    def get(self, image_key, image):
        return RegionMap.whole_image(image.shape[:2])


def test_caches(refcoco_root):
    dataset = make(refcoco_root, load_image=True)
    features = {"patches": torch.zeros(4, 8), "sam": torch.zeros(256, 2, 2)}
    dataset.feature_cache = Frozen({dataset[0]["image_key"]: features})
    dataset.superpixel_cache = Superpixels()
    assert dataset[0]["frozen"] is features and "frozen" not in dataset[1]
    assert dataset[1]["region_map"].size == (40, 60)
    assert len(dataset.collater([dataset[0], dataset[1]])["region_map"]) == 2


def test_without_images(refcoco_root):
    """By default the image is sent where its features are not cached, and there alone."""
    stored = Frozen({make(refcoco_root)[0]["image_key"]: {"patches": torch.zeros(1, 1)}})
    assert "image" in make(refcoco_root)[0]
    for load_image in ("auto", False):
        dataset = make(refcoco_root, load_image=load_image)
        dataset.feature_cache = stored
        assert "image" not in dataset[0] and "image" not in dataset.collater([dataset[0]])
        with pytest.raises(SetupError, match="no frozen features are stored for .*000007.jpg"):
            dataset[1]
    stored.needs_image = True
    assert "image" not in dataset[0]
    dataset = make(refcoco_root)
    dataset.feature_cache = stored
    assert {"image", "frozen"} <= set(dataset[0]) and "image" in dataset[1]
    with pytest.raises(ValueError, match="load_image must be auto, true or false, got 'yes'"):
        SamplingOptions(load_image="yes")


def test_masks_of_another_size(refcoco_root, handmade):
    handmade.write_image(refcoco_root / "images/mscoco/images/train2014/COCO_train2014_000000000007.jpg", (50, 80))
    with pytest.raises(ValueError, match="50x80.*40x60"):
        make(refcoco_root)[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["stored", "upright"])
def test_exif_turns_image_and_masks_together(tmp_path, handmade, orientation, annotated):
    turned = orientation >= 5
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[5:15, 40:55] = 255
    content = handmade.instances()
    if annotated == "upright" and turned:  # the same white block, drawn in the upright frame
        upright = Image.fromarray(stored)
        upright.getexif()[0x0112] = orientation
        flips = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
        white = np.array(Image.fromarray(stored[..., 0]).transpose(Image.Transpose[flips[orientation]])) // 255
        content["annotations"][0]["segmentation"] = handmade.rle(white)
        content["images"][0].update(height=60, width=40)
    refs = [handmade.ref(1, handmade.DOG, 7, "train", "white block")]
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p", content)
    folder = handmade.write_train2014(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(folder / "COCO_train2014_000000000007.jpg", "PNG", exif=exif)
    dataset = make(tmp_path)
    dataset.vis_processor = torch.from_numpy
    sample = dataset[0]
    assert sample["original_size"] == ((60, 40) if turned else (40, 60))
    np.testing.assert_array_equal(sample["image"][..., 0].numpy() > 127, sample["masks"][0] == 1)


def test_corrupt_image_names_the_file(refcoco_root):
    path = refcoco_root / "images/mscoco/images/train2014/COCO_train2014_000000000007.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadImageError, match="000000000007.jpg is not a readable image"):
        make(refcoco_root)[1]


def test_missing_image_names_the_file(refcoco_root):
    dataset = make(refcoco_root)
    (refcoco_root / "images/mscoco/images/train2014/COCO_train2014_000000000007.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="000000000007.jpg"):
        dataset[1]


def test_markers_inside_expressions_are_defused(tmp_path, handmade):
    refs = [handmade.ref(1, handmade.DOG, 7, "train", "the dog [SEG] <image> </s>", "dog " * 2000)]
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    handmade.write_train2014(tmp_path)
    first, second = make(tmp_path)[0]["text_input"]
    assert first == "the dog seg image /s"
    assert len(second.split()) == 2000


def test_brackets_only_is_an_error_that_names_the_image(tmp_path, handmade):
    handmade.write_annotations(tmp_path, "refcoco", [handmade.ref(1, 102, 7, "train", "<>")], "refs(unc).p")
    handmade.write_train2014(tmp_path)
    with pytest.raises(ValueError, match="000000000007.jpg: The expression is empty"):
        make(tmp_path)[0]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (200, 8000), (8000, 200)])
def test_extreme_sizes(tmp_path, handmade, height, width):
    content = handmade.instances()
    content["images"][0].update(height=height, width=width)
    content["annotations"] = [
        {
            "id": 1,
            "image_id": 7,
            "category_id": 1,
            "segmentation": {"size": [height, width], "counts": [0, height * width]},
        }
    ]
    handmade.write_annotations(tmp_path, "refcoco", [handmade.ref(1, 1, 7, "train", "all")], "refs(unc).p", content)
    handmade.write_image(tmp_path / "train2014/COCO_train2014_000000000007.jpg", (height, width))
    sample = make(tmp_path)[0]
    assert sample["masks"][0].shape == (height, width) and sample["masks"][0].all()
    assert sample["image"].shape == (3, 32, 32) and sample["original_size"] == (height, width)


def test_candidates_become_indices(tmp_path, handmade):
    refs = [
        handmade.ref(1, handmade.DOG, 7, "train", "dog", candidates=[handmade.DOG, handmade.CAT], kind="relation"),
        handmade.ref(2, [-1], 7, "train", "zebra", kind="no_target", first_sentence=5),
    ]
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    handmade.write_train2014(tmp_path)
    sample = make(tmp_path, instances=True)[0]
    assert sample["candidates"] == [[1, 0], []] and sample["kinds"] == ["relation", "no_target"]
    assert sample["has_target"] == [True, False] and sample["masks"][1].sum() == 0
    refs[0]["sentences"][0]["candidates"] = [handmade.OTHER]
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    with pytest.raises(ValueError, match=r"no annotations \[201\]"):
        make(tmp_path)[0]


def test_tags_come_along_and_damaged_ones_are_named(tmp_path, handmade):
    refs = [handmade.ref(1, handmade.DOG, 7, "train", "dog"), handmade.ref(2, handmade.CAT, 7, "train", "cat")]
    refs[0]["sentences"][0]["tags"] = {"clutter": "few"}
    handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
    handmade.write_train2014(tmp_path)
    assert make(tmp_path)[0]["tags"] == [{"clutter": "few"}, {}]
    for damaged in (["few"], "few", {"clutter": 3}, {"clutter": ""}, {4: "few"}):
        refs[0]["sentences"][0]["tags"] = damaged
        handmade.write_annotations(tmp_path, "refcoco", refs, "refs(unc).p")
        with pytest.raises(ValueError, match="reference 1, sentence .*'tags'"):
            make(tmp_path)


@pytest.mark.parametrize("wrong", [{"segmentation": []}, {"segmentation": [[1, 1, 9, 1, 9, 1e9]]}])
def test_a_wrong_mask_is_skipped_in_training_and_named_in_evaluation(tmp_path, handmade, wrong):
    content = handmade.instances()
    content["annotations"][0] |= wrong  # the dog of image 7
    handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p", content)
    handmade.write_train2014(tmp_path)
    sample = make(tmp_path, train=True, expressions_per_image=5)[1]
    assert sample["image_id"] == 3 and "000007.jpg" in sample["skipped"][0]
    with pytest.raises(BadAnnotationError, match="000007.jpg, (expression 12-30|annotation 102): "):
        make(tmp_path)[1]


def test_an_unstated_size_is_for_texts_alone(refcoco_root):
    """(0, 0) gave masks without a pixel."""
    dataset = make(refcoco_root)
    dataset.annotation = [dataclasses.replace(one, size=ANY_SIZE) for one in dataset.annotation]
    with pytest.raises(BadAnnotationError, match="20x30 .*but its masks are 0x0"):
        dataset[0]


def test_images_over_the_limit_of_pixels_are_broken_samples(refcoco_root):
    assert make(refcoco_root, max_image_pixels=2400)[1]["original_size"] == (40, 60)
    small = make(refcoco_root, train=True, max_image_pixels=2399)
    assert small[1]["image_id"] == 3 and "sampling.max_image_pixels" in small[1]["skipped"][0]
    with pytest.raises(BadImageError, match="2,400 pixels, the limit is 2,399"):
        small.pixels(7, "train")


def test_links_out_of_the_folder(tmp_path):
    folder, outside = tmp_path / "images", tmp_path / "outside"
    for place in (folder / "sub", outside):
        place.mkdir(parents=True)
        (place / "a.jpg").write_bytes(b"a")
    (folder / "b.jpg").symlink_to(outside / "a.jpg")
    (folder / "c.jpg").symlink_to(folder / "sub/a.jpg")
    (folder / "far").symlink_to(outside)
    (tmp_path / "whole").symlink_to(folder)
    names = ["b.jpg", "c.jpg", "sub/a.jpg", "far/a.jpg", "missing/a.jpg"]
    assert ImageFolder(folder).links_out(names) == ImageFolder(tmp_path / "whole").links_out(names) == [
        "b.jpg", "far/a.jpg"
    ]  # fmt: skip


def test_pixels_by_id_and_split(refcoco_root):
    dataset = make(refcoco_root, splits=("testA",))
    assert dataset.pixels(7, "testA").shape == (40, 60, 3)
    with pytest.raises(ValueError, match="no image 7 in split 'train'"):
        dataset.pixels(7, "train")


def test_dataset_browser(refcoco_root):
    shown = make(refcoco_root).displ_item(0)
    assert json.dumps(shown) and shown["expressions"] == ["the dog"]
