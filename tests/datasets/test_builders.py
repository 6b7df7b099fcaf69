"""LAVIS builds the data sets from their YAML files: types, places, unknown keys."""

from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset
from omegaconf import OmegaConf

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.builders import (
    CONFIGS,
    DatasetOptions,
    ReferringBuilder,
    RefPhotosOptions,
    RefShapesOptions,
    RefThingsOptions,
    SplitOptions,
    TrainPhotosOptions,
)
from lavis_svp.datasets.layout import SPECS, MissingDataError
from lavis_svp.datasets.sampling import SamplingOptions

BUILDERS = (
    "refcoco_seg",
    "refcoco_plus_seg",
    "refcocog_seg",
    "grefcoco_seg",
    "refshapes_seg",
    "refthings_seg",
    "photos_seg",
    "refphotos_seg",
    "trainphotos_seg",
    "referring_shards_seg",
)
OF_TEXTS = ("vqa_files", "caption_files", "refshapes_vqa", "refshapes_caption")  # tested in test_answering.py
BUILT_IN = ("refshapes_seg", "refthings_seg", "photos_seg", "refphotos_seg", "trainphotos_seg")
OWN_FORM = (*BUILT_IN, "referring_shards_seg")
"""Builders that do not read a tree in RefCOCO's format that is there already."""
TYPES = [(name, kind) for name in BUILDERS for kind in registry.get_builder_class(name).DATASET_CONFIG_DICT]
NEEDED = {
    "refcoco_seg": {"default", "train", "val", "testA", "testB", "test", "google"},
    "refcoco_plus_seg": {"default", "train", "val", "testA", "testB", "test"},
    "refcocog_seg": {"default", "train", "val", "test", "google", "google_train", "google_val"},
    "grefcoco_seg": {"default", "train", "val", "testA", "testB", "test"},
    "refshapes_seg": {"default", "train", "val", "test", "crowded"},
    "refthings_seg": {"default", "train", "val", "test"},
    "photos_seg": {"default"},
    "refphotos_seg": {"default"},
    "trainphotos_seg": {"default", "train", "val"},
    "referring_shards_seg": {"default"},
}


def section(name, kind="default", **changes):
    """A builder's section with some dotted keys changed, as LAVIS merges a project's YAML into it."""
    path = registry.get_builder_class(name).default_config_path(kind)
    config = OmegaConf.load(path).datasets[name]
    return OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes.items()]))


def built(name, kind="default", **changes):
    return registry.get_builder_class(name)(section(name, kind, **changes)).build_datasets()


def every_split(handmade, partition):
    """References of each split of a partition."""
    splits = ("train", "val", "testA", "testB") if partition == "unc" else ("train", "val", "test")
    return [handmade.ref(i, handmade.CAT, 7, split, "the cat", first_sentence=i) for i, split in enumerate(splits)]


@pytest.fixture
def all_data(tmp_path, handmade):
    """A root with all public data sets in all partitions."""
    for spec in SPECS.values():
        if spec.images is None:
            for partition in spec.split_by:
                refs = every_split(handmade, partition)
                suffix = ".json" if spec.refs == "grefs" else ".p"
                handmade.write_annotations(tmp_path, spec.folder, refs, f"{spec.refs}({partition}){suffix}")
    handmade.write_train2014(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BUILDERS)
def test_types(name):
    cls = registry.get_builder_class(name)
    assert set(cls.DATASET_CONFIG_DICT) == NEEDED[name]
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in cls.DATASET_CONFIG_DICT.values())
    with pytest.raises(UnknownNameError, match="Known: .*default"):
        cls.default_config_path("testC")


@pytest.mark.parametrize(("name", "kind"), TYPES)
def test_yaml_files(name, kind):
    """One section, named as the builder; every key is known; LAVIS's vis_path has its place."""
    content = OmegaConf.load(registry.get_builder_class(name).default_config_path(kind))
    assert list(content) == ["datasets"] and list(content.datasets) == [name]
    builder = registry.get_builder_class(name)(content.datasets[name])
    assert builder.sections(SplitOptions)
    assert "storage" in content.datasets[name].build_info.images


@pytest.mark.parametrize("name", BUILDERS)
def test_default_yaml_shows_every_key_with_its_default(name):
    shown = OmegaConf.to_container(section(name))
    own = {
        "refshapes_seg": RefShapesOptions,
        "refthings_seg": RefThingsOptions,
        "refphotos_seg": RefPhotosOptions,
        "trainphotos_seg": TrainPhotosOptions,
    }
    options = own.get(name, DatasetOptions)()
    missing = set(vars(options)) - set(shown) - {"type", "dataset_card"}
    assert not missing
    assert set(shown["sampling"]) == set(vars(SamplingOptions()))
    assert set(shown["build_info"]) == set(vars(options.build_info))
    defaults = vars(SamplingOptions()) | {"instances": name in BUILT_IN}
    assert shown["sampling"] == defaults


@pytest.mark.parametrize(("name", "kind"), [pair for pair in TYPES if pair[0] not in OWN_FORM])
def test_every_type_builds(all_data, name, kind):
    datasets = built(name, kind, **{"build_info.root": all_data})
    shown = {split: [dataset[i]["split"] for i in range(len(dataset))] for split, dataset in datasets.items()}
    if (name, kind) == ("refcoco_seg", "google"):
        assert shown == {"train": ["train"], "val": ["val"], "test": ["test"]}
    elif kind == "default":
        test = ["test"] if name == "refcocog_seg" else ["testA", "testB"]
        assert shown == {"train": ["train"], "val": ["val"], "test": test}
    elif kind.endswith("train"):
        assert shown == {"train": ["train"]}
    elif (name, kind) == ("refcocog_seg", "google"):
        assert shown == {"train": ["train"], "val": ["val"]}
    else:
        wanted = {"test": ["testA", "testB"]}.get(kind, [kind.removeprefix("google_")])
        assert shown == {"test": ["test"] if name == "refcocog_seg" and kind == "test" else wanted}


def test_load_dataset_with_vis_path(all_data, own_cache, monkeypatch):
    """A root as vis_path is enough; images alone are enough where the annotations are in the cache folder."""
    datasets = load_dataset("refcoco_seg", vis_path=str(all_data))
    assert {split: len(dataset) for split, dataset in datasets.items()} == {"train": 1, "val": 1, "test": 2}
    assert datasets["test"][0]["image"].shape == (3, 1024, 1024)
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(own_cache))
    with pytest.raises(MissingDataError):
        load_dataset("refcoco_seg", vis_path=str(all_data / "images"))
    own_cache.mkdir(parents=True)
    (own_cache / "data").symlink_to(all_data)
    assert load_dataset("refcoco_seg", vis_path=str(all_data / "images/mscoco/images/train2014"))["val"][0]


def test_three_ways_to_say_where(all_data, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(all_data.parent))
    monkeypatch.setenv("REFERRING_DATA", str(all_data))
    for root in (str(all_data), all_data.name, "${oc.env:REFERRING_DATA}"):
        assert len(built("refcoco_seg", "val", **{"build_info.root": root})["test"]) == 1


def test_links_out_of_the_images_folder_are_named_once(all_data, tmp_path, caplog):
    """In one warning, though several splits read the image."""
    (image,) = (all_data / "images/mscoco/images/train2014").glob("*7.jpg")
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    built("refcoco_seg", **{"build_info.root": all_data})
    (warning,) = [record.getMessage() for record in caplog.records if "links" in record.getMessage()]
    assert "train2014: links lead 1 images out of this folder: COCO_train2014_000000000007.jpg" in warning


def test_missing_data_names_the_doctor(tmp_path):
    with pytest.raises(MissingDataError, match=r"refs\(unc\).p.*lavis-svp data doctor --root .* --dataset refcoco"):
        built("refcoco_seg", **{"build_info.root": tmp_path})


def test_missing_images_name_key_and_doctor(tmp_path, handmade):
    handmade.write_annotations(tmp_path, "refcoco", handmade.refcoco_refs(), "refs(unc).p")
    with pytest.raises(MissingDataError, match=r"train2014.*build_info.images.storage.*lavis-svp data doctor"):
        built("refcoco_seg", **{"build_info.root": tmp_path})


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("vis_procesor.train.name", r"'vis_procesor' \(did you mean 'vis_processor'\?\) in datasets.refcoco_seg"),
        ("build_info.rooot", r"'rooot' \(did you mean 'root'\?\) in datasets.refcoco_seg.build_info"),
        ("build_info.annotations.train.split", r"'split' \(did you mean 'splits'\?\)"),
        ("build_info.annotations.testA.splits", "'testA'"),
        ("build_info.sizes", "'sizes'"),
        ("sampling.protocl", r"'protocl' \(did you mean 'protocol'\?\)"),
        ("vis_processor.test.name", "'test' in refcoco_seg.vis_processor"),
        ("vis_processor.eval.size", "'size' .*in svp_image_eval"),
        ("text_processor.eval.size", "'size' in svp_referring"),
    ],
)
def test_unknown_keys_are_named(all_data, key, named):
    with pytest.raises(ValueError, match=named):
        built("refcoco_seg", **{"build_info.root": all_data, key: "x"})


def test_a_split_set_to_null_is_left_out(all_data):
    assert set(built("refcoco_seg", **{"build_info.root": all_data, "build_info.annotations.val": "null"})) == {
        "train",
        "test",
    }


def test_a_split_made_of_nothing(all_data):
    with pytest.raises(ValueError, match=r"annotations.val is .*splits"):
        built("refcoco_seg", **{"build_info.root": all_data, "build_info.annotations.val.splits": "[]"})


def test_options_reach_the_dataset(all_data):
    changes = {"sampling.max_expressions": 2, "vis_processor.train.image_size": 64, "vis_processor.train.hflip_prob": 1}
    datasets = built("refcoco_seg", **{"build_info.root": all_data, **changes})
    assert datasets["val"].options.max_expressions == 2
    sample = datasets["train"][0]
    assert sample["image"].shape == (3, 64, 64) and sample["image_key"].endswith("-mirrored")


def test_the_keys_of_release_0_1_still_work(all_data):
    """LAVIS merges a project's YAML into the default one, so that the old name stands next to the new one."""
    changes = {"drawing.expressions_per_picture": 5, "drawing.max_expressions": 2, "build_info.root": all_data}
    with pytest.warns(FutureWarning, match="sampling"):
        options = built("refcoco_seg", "val", **changes)["test"].options
    assert (options.expressions_per_image, options.max_expressions, options.seed) == (5, 2, 0)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="'protocl'"):
        built("refcoco_seg", **{"drawing.protocl": "x"})


def test_stock_processors_of_lavis_fit_in(all_data):
    changes = {"text_processor.eval.name": "blip_caption", "build_info.root": all_data}
    assert built("refcoco_seg", "val", **changes)["test"][0]["text_input"] == ["the cat"]


def test_superpixels_of_the_dataset(all_data, tmp_path):
    changes = {"superpixels.method": "grid", "superpixels.root": tmp_path / "kept", "build_info.root": all_data}
    dataset = built("refcoco_seg", "val", **changes)["test"]
    assert dataset[0]["region_map"].size == (40, 60) and list((tmp_path / "kept").rglob("*.png"))


def test_concatenation_with_lavis(all_data):
    from lavis.datasets.datasets.base_dataset import ConcatDataset

    parts = [
        built(name, "train", **{"build_info.root": all_data, "vis_processor.train.image_size": 32})["train"]
        for name in ("refcoco_seg", "grefcoco_seg")
    ]
    joined = ConcatDataset(parts)
    batch = joined.collater([joined[0], joined[1]])
    assert batch["image"].shape == (2, 3, 32, 32) and len(batch["masks"]) == 2


def test_every_yaml_belongs_to_a_builder():
    used = {
        path for name in BUILDERS + OF_TEXTS for path in registry.get_builder_class(name).DATASET_CONFIG_DICT.values()
    }
    assert used == {str(path) for path in CONFIGS.rglob("*.yaml")}
    assert all(issubclass(registry.get_builder_class(name), ReferringBuilder) for name in BUILDERS)


def test_refshapes_is_made_on_first_use(tmp_path):
    changes = {"build_info.root": tmp_path, "build_info.sizes.train": 2, "build_info.sizes.test": 1}
    changes |= {"vis_processor.train.image_size": 64, "vis_processor.eval.image_size": 64}
    datasets = built("refshapes_seg", "test", **changes)
    sample = datasets["test"][0]
    assert sample["image"].shape == (3, 64, 64)
    assert set(sample["kinds"]) <= {"attribute", "relation", "superlative", "no_target"}
    assert len(sample["instances"]["words"]) == sample["instances"]["labels"].max() + 1
    assert len(sample["candidates"]) == len(sample["kinds"]) and any(sample["candidates"])
    assert all(mask.any() == has for mask, has in zip(sample["masks"], sample["has_target"], strict=True))
    unsized = {key: value for key, value in changes.items() if "sizes" not in key}
    train = built("refshapes_seg", "train", **unsized)["train"]  # no size asked for: what is there stays
    assert len(train) == 2 and len(train[0]["text_input"]) == 3


def test_crowded_refshapes_has_more_and_smaller_objects(tmp_path):
    changes = {"vis_processor.train.image_size": 64, "vis_processor.eval.image_size": 64, "build_info.sizes.test": 3}
    usual, crowded = (
        built("refshapes_seg", kind, **changes, **{"build_info.root": tmp_path / kind, **more})
        for kind, more in (
            ("test", {}),
            ("crowded", {"build_info.annotations.train": "null", "build_info.annotations.val": "null"}),
        )
    )
    counts = [[len(dataset["test"][i]["instances"]["words"]) for i in range(3)] for dataset in (usual, crowded)]
    assert max(counts[0]) <= 8 <= min(counts[1])


def test_scenes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="from 1 to 15 objects; got min_objects 3, max_objects 16"):
        built("refshapes_seg", "test", **{"build_info.scene.max_objects": 16})
    with pytest.raises(ValueError, match="the large ones above the small ones"):
        built("refshapes_seg", "test", **{"build_info.scene.small_radius": "[60, 80]"})
    with pytest.raises(ValueError, match="did you mean 'max_objects'"):
        built("refshapes_seg", "test", **{"build_info.scene.max_object": 4})


def test_backgrounds_of_refshapes_are_an_option(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lavis_svp.datasets.refshapes.build.build_refshapes", lambda *_, backgrounds: asked.append(backgrounds)
    )
    monkeypatch.setattr("lavis_svp.datasets.answering_builders.build_answers", lambda *_: None)
    for name in ("refshapes_seg", "refshapes_vqa"):
        for backgrounds in ("null", "released_0_5"):
            changes = {"build_info.root": tmp_path, "build_info.backgrounds": backgrounds}
            registry.get_builder_class(name)(section(name, **changes)).make_data()
    assert asked == ["untested", "released_0_5"] * 2


def test_photos_are_made_on_first_use(tmp_path, handmade, monkeypatch):
    """The true ones come from wheels; here a stand-in writes the same format."""
    made = []

    def build_photos(root):
        made.append(root)
        content = handmade.instances()
        content["images"][0]["file_name"] = "street.jpg"
        refs = [handmade.ref(1, handmade.DOG, 7, "test", "the hot dog", kind="attribute", candidates=[handmade.DOG])]
        handmade.write_annotations(root, "photos", refs, "refs(svp).p", content)
        handmade.write_image(root / "images/photos/street.jpg", (40, 60))

    monkeypatch.setattr("lavis_svp.datasets.photos.build_photos", build_photos)
    datasets = built("photos_seg", **{"build_info.root": tmp_path, "vis_processor.eval.image_size": 64})
    assert list(datasets) == ["test"] and made == [tmp_path]
    assert datasets["test"][0]["candidates"] == [[1]]


@pytest.fixture
def shards(all_data, tmp_path):
    """RefCOCO (unc) of ``all_data`` as shards."""
    from lavis_svp.cli.data import main

    out = tmp_path / "shards"
    assert main(["shards", "convert", "--out", str(out), "--dataset", "refcoco", "--root", str(all_data)]) == 0
    return out


@pytest.mark.parametrize("kind", ["default", "train", "val", "testA", "test"])
def test_shards_in_place_of_the_files(all_data, shards, kind, monkeypatch):
    small = {"vis_processor.train.image_size": 32, "vis_processor.eval.image_size": 32}
    folder = built("refcoco_seg", kind, **small, **{"build_info.root": all_data})
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(shards.parent))
    packed = built("refcoco_seg", kind, **small, **{"build_info.shards": shards.name, "build_info.root": "/nowhere"})
    assert list(folder) == list(packed)
    for split, dataset in folder.items():
        assert dataset.expression_ids() == packed[split].expression_ids()
        for index in range(len(dataset)):
            first, second = dataset[index], packed[split][index]
            assert first["image_key"] == second["image_key"] and (first["image"] == second["image"]).all()


def test_shards_of_another_data_set_and_missing_ones(shards, tmp_path):
    with pytest.raises(ValueError, match=r"made from refcoco \(unc\), not from refcoco\+ \(unc\)"):
        built("refcoco_plus_seg", **{"build_info.shards": shards})
    with pytest.raises(ValueError, match=r"not from refcoco \(google\)"):
        built("refcoco_seg", "google", **{"build_info.shards": shards})
    with pytest.raises(FileNotFoundError, match="index.json is missing"):
        built("refcoco_seg", **{"build_info.shards": tmp_path})
    with pytest.raises(UnknownNameError, match="testA"):
        built("refcoco_seg", **{"build_info.shards": shards, "build_info.annotations.train.splits": "[testC]"})


def test_shards_of_any_origin(shards):
    with pytest.raises(ValueError, match=r"set datasets.referring_shards_seg.build_info.shards"):
        built("referring_shards_seg")
    assert len(built("referring_shards_seg", **{"build_info.shards": shards})["train"]) == 1
    chosen = {"build_info.annotations.train": "null", "build_info.annotations.test.splits": "[testA, testB]"}
    assert list(built("referring_shards_seg", **{"build_info.shards": shards}, **chosen)) == ["test"]
    datasets = load_dataset("referring_shards_seg", vis_path=str(shards))
    assert datasets["train"][0]["file_name"] == "COCO_train2014_000000000007.jpg"


def test_superpixels_of_shards_must_be_those_that_the_section_asks_for(all_data, tmp_path):
    from lavis_svp.cli.data import main
    from lavis_svp.cli.superpixels import main as superpixels

    images = all_data / "images/mscoco/images/train2014"
    grid = ["--generator", "grid", "--options", "rows=2", "cols=2", "--workers", "1"]
    assert superpixels(["make", str(images), "--store", str(tmp_path / "store"), *grid]) == 0
    (store,) = (tmp_path / "store").iterdir()
    out = tmp_path / "shards"
    asked = ["--dataset", "refcoco", "--root", str(all_data), "--superpixels", str(store)]
    assert main(["shards", "convert", "--out", str(out), *asked]) == 0
    small = {"build_info.shards": out, "vis_processor.train.image_size": 32}
    assert built("refcoco_seg", "train", **small)["train"][0]["region_map"].count == 4
    assert "region_map" not in built("refcoco_seg", "train", **small, **{"build_info.use_stored": False})["train"][0]
    own = {"superpixels.method": "grid", "superpixels.options.rows": 2, "superpixels.options.cols": 2}
    assert built("refcoco_seg", "train", **small, **own)["train"][0]["region_map"].count == 4
    with pytest.raises(ValueError, match=r"superpixels made with other settings \(rows: 2 there, 3 wanted\)"):
        built("refcoco_seg", "train", **small, **(own | {"superpixels.options.rows": 3}))
