"""JSONL and COCO with expressions: what it can say, what it refuses with file and line, and the way through shards."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_svp.cli.data import main
from lavis_svp.common.files import BadFileError
from lavis_svp.common.images import BadImageError, read_image
from lavis_svp.datasets.custom_formats import CocoExpressions, JsonlSource
from lavis_svp.datasets.shards.read import ShardSource
from lavis_svp.datasets.sources import ANY_SIZE, BadAnnotationError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"
BOX = [[2, 2, 10, 2, 10, 8, 2, 8]]


@pytest.fixture
def write(tmp_path):
    """write(*lines) -> path of a JSONL file beside two images and a mask image."""
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (30, 20), (10, 90, 40)).save(tmp_path / "photos" / name)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9, 3:7] = 255
    Image.fromarray(mask).save(tmp_path / "cup.png")

    def make(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return make


def test_everything_it_can_say(write):
    source = JsonlSource(
        write(
            {"image": "photos/a.jpg", "expressions": [{"text": "the box", "segmentation": BOX}]},
            "",
            {
                "image": "photos/b.png",
                "id": 77,
                "split": "val",
                "instances": [
                    {"segmentation": BOX, "category": "cup", "attributes": ["red"]},
                    {"segmentation": "cup.png"},
                ],
                "expressions": [
                    {"text": "both", "targets": [0, 1]},
                    {"text": "the red cup", "targets": [0], "kind": "attribute"},
                    {"text": "a zebra", "targets": []},
                    {"text": "runs", "segmentation": {"size": [20, 30], "counts": [590, 10]}},
                ],
            },
        )
    )
    assert source.splits() == ["train", "val"]
    (first,), (second,) = source.images("train"), source.images("val")
    assert (first.image_id, first.size, first.file_name) == (1, (20, 30), "photos/a.jpg")
    assert [one.expression_id for one in second.expressions] == ["77-0", "77-1", "77-2", "77-3"]
    assert [one.kind for one in second.expressions] == ["expression", "attribute", "no_target", "expression"]
    both, cup, none, runs = (source.target_mask(second, one) for one in second.expressions)
    assert both.sum() == (cup | source.mask(second, source.instances(second)[1])).sum() > cup.sum() > 0
    assert none.sum() == 0 and runs.sum() == 10
    assert source.instances(second)[0].words == ["cup", "red"]


BAD_LINES = [
    ('{"image": ', "Expecting value"),
    ("[1]", "a line must be a JSON object"),
    ({"expressions": [{"text": "x", "targets": []}]}, "'image' must be a text"),
    ({"image": "photos/a.jpg", "expressions": []}, "at least one expression"),
    ({"image": "photos/a.jpg", "expresions": []}, "did you mean 'expressions'"),
    ({"image": "../a.jpg", "expressions": [{"text": "x", "targets": []}]}, "leads out of its folder"),
    ({"image": "/a.jpg", "expressions": [{"text": "x", "targets": []}]}, "leads out of its folder"),
    ({"image": "photos/a.jpg", "expressions": [{"text": " ", "targets": []}]}, "'text' must be a text"),
    ({"image": "photos/a.jpg", "expressions": [{"text": "x"}]}, "either a segmentation or targets"),
    ({"image": "photos/a.jpg", "expressions": [{"text": "x", "targets": [0]}]}, "indices into the line's 0 instances"),
    (
        {
            "image": "photos/a.jpg",
            "instances": [{"segmentation": BOX}] * 2,
            "expressions": [{"text": "x", "targets": [True]}],
        },
        "indices into the line's 2 instances",
    ),
    ({"image": "photos/a.jpg", "expressions": [{"text": "x", "segmentation": 5}]}, "a segmentation is polygons"),
    ({"image": "photos/a.jpg", "expressions": [{"text": "x", "segmentation": "../m.png"}]}, "leads out"),
    ({"image": "photos/a.jpg", "id": -1, "expressions": [{"text": "x", "targets": []}]}, "id is a number from 0"),
    ({"image": "photos/a.jpg", "id": 1, "expressions": [{"text": "x", "targets": []}]}, "that of line 1 already"),
]


BAD_LINES += [
    ("[" * 100_000, "the line is truncated or not JSON"),
    ({"image": 5, "expressions": []}, "'image' must be a text"),
    ({"image": "a\0.jpg", "expressions": []}, "cannot name a file"),
    ({"image": "a\ud800.jpg", "expressions": []}, "'image' must be a text"),
    ({"image": "photos/a.jpg", "id": 2**63, "expressions": []}, "id is a number from 0 on"),
    ({"image": "photos/a.jpg", "split": 5, "expressions": []}, "'split' must be a text"),
    ({"image": "photos/a.jpg", "expressions": [5]}, "expression 0 must be a JSON object"),
    ({"image": "photos/a.jpg", "instances": [5], "expressions": []}, "an instance must be a JSON object"),
    ({"image": "photos/a.jpg", "instances": 5, "expressions": []}, "'instances' must be a list"),
    ({"image": "photos/a.jpg", "expressions": [{"text": "x", "kind": [], "targets": []}]}, "'kind' must be a text"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_wrong_line_is_named(write, line, message):
    good = {"image": "photos/a.jpg", "expressions": [{"text": "the box", "segmentation": BOX}]}
    with pytest.raises(BadFileError, match=rf"data.jsonl:2: .*{message}") as caught:
        JsonlSource(write(good, line))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named_with_their_line(write):
    path = write({"image": "photos/a.jpg", "expressions": [{"text": "the box", "segmentation": BOX}]})
    path.write_bytes(path.read_bytes() + b'{"image": "\xff\xfe"}\n')
    with pytest.raises(BadFileError, match="data.jsonl:2: .*UnicodeDecodeError"):
        JsonlSource(path)


def test_a_bomb_among_the_images_does_not_stop_the_reading(write, tmp_path):
    """Its header alone is read here; reading the image says what is wrong."""
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    line = {"image": "bomb.png", "expressions": [{"text": "x", "segmentation": BOX}]}
    (image,) = JsonlSource(write(line)).images("train")
    assert image.size == ANY_SIZE
    with pytest.raises(BadImageError, match="196,000,000|too many pixels"):
        read_image(tmp_path / image.file_name)


def test_an_image_above_the_usual_limit_has_its_size_and_mask(write, tmp_path):
    """``sampling.max_image_pixels`` decides whether it is read."""
    picture = Image.new("1", (9500, 9500))
    picture.paste(1, (2, 3, 12, 8))
    picture.save(tmp_path / "large.png")
    line = {"image": "large.png", "expressions": [{"text": "x", "segmentation": "large.png"}]}
    source = JsonlSource(write(line))
    (image,) = source.images("train")
    assert image.size == (9500, 9500)
    assert source.target_mask(image, image.expressions[0]).sum() == 50


def test_mask_images_out_of_the_folder(write, tmp_path):
    source = write({"image": "photos/a.jpg", "expressions": [{"text": "x", "segmentation": "mask.png"}]})
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "photos").rename(folder / "photos")
    (folder / "mask.png").symlink_to(tmp_path / "cup.png")
    for follow, said in ((True, None), (False, "mask.png is a link out of")):
        read = JsonlSource(source, folder, follow_links=follow)
        (image,) = read.images("train")
        if said is None:
            assert read.target_mask(image, image.expressions[0]).sum() == 16
        else:
            with pytest.raises(BadAnnotationError, match=said):
                read.target_mask(image, image.expressions[0])


def test_an_empty_file(write):
    with pytest.raises(ValueError, match="holds no line"):
        JsonlSource(write())


def test_masks_that_do_not_fit_and_missing_images_are_named_by_the_conversion(write, tmp_path, capsys):
    Image.new("L", (5, 5), 255).save(tmp_path / "small.png")
    for line, message in (
        ({"image": "photos/a.jpg", "expressions": [{"text": "x", "segmentation": "small.png"}]}, "small.png is (5, 5)"),
        ({"image": "photos/c.jpg", "expressions": [{"text": "x", "segmentation": BOX}]}, "photos/c.jpg"),
    ):
        with pytest.raises(SystemExit):
            main(["shards", "convert", "--out", str(tmp_path / "out"), "--jsonl", str(write(line))])
        assert message in capsys.readouterr().err
        (tmp_path / "out/unfinished.json").unlink()


def test_the_documents_example_converts(write, tmp_path):
    block = re.search(r"```jsonl\n(.*?)```", DOCUMENT.read_text(), re.DOTALL).group(1)
    path = write(*block.strip().splitlines())
    out = tmp_path / "shards"
    assert main(["shards", "convert", "--out", str(out), "--jsonl", str(path)]) == 0
    shards, source = ShardSource(out), JsonlSource(path)
    assert shards.splits() == source.splits() == ["train", "val"]
    for split in source.splits():
        for mine, theirs in zip(shards.images(split), source.images(split), strict=True):
            assert mine == theirs
            for one in theirs.expressions:
                np.testing.assert_array_equal(shards.target_mask(mine, one), source.target_mask(theirs, one))
    assert main(["shards", "validate", str(out)]) == 0


def test_a_transparent_mask_is_refused_and_an_opaque_alpha_is_not(write, tmp_path):
    mask = np.zeros((20, 30, 4), np.uint8)
    mask[5:9, 3:7] = 255
    Image.fromarray(mask).save(tmp_path / "alpha.png")
    mask[..., 3] = 255
    Image.fromarray(mask).save(tmp_path / "opaque.png")
    expressions = [{"text": name, "segmentation": f"{name}.png"} for name in ("alpha", "opaque")]
    source = JsonlSource(write({"image": "photos/a.jpg", "expressions": expressions}))
    (image,) = source.images("train")
    with pytest.raises(ValueError, match="alpha.png is transparent"):
        source.target_mask(image, image.expressions[0])
    assert source.target_mask(image, image.expressions[1]).sum() == 16


@pytest.fixture
def content(handmade):
    """COCO's hand-made file with expressions of the dog and the cat."""
    made = handmade.instances()
    texts = {handmade.DOG: ["brown dog", "dog on the right"], handmade.CAT: "the cat", handmade.OTHER: "a dog"}
    for annotation in made["annotations"]:
        if annotation["id"] in texts:
            annotation["expressions"] = texts[annotation["id"]]
    made["images"][1]["split"] = "val"
    return made


def write_coco(tmp_path, content, name="instances.json"):
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


def test_expressions_of_annotations(tmp_path, content, handmade):
    source = CocoExpressions(write_coco(tmp_path, content))
    assert source.splits() == ["train", "val"]
    (image,) = source.images("train")
    assert [(one.expression_id, one.text) for one in image.expressions] == [
        ("101-0", "the cat"),
        ("102-0", "brown dog"),
        ("102-1", "dog on the right"),
    ]
    assert source.target_mask(image, image.expressions[1]).sum() == 150
    assert [one.text for one in source.images("val")[0].expressions] == ["a dog"]


def test_expressions_of_their_own_file_and_another_key(tmp_path, content, handmade):
    beside = write_coco(tmp_path, {str(handmade.CAT): ["kitty"]}, "texts.json")
    (image,) = CocoExpressions(write_coco(tmp_path, content), beside).images("train")
    assert [one.text for one in image.expressions] == ["kitty"]
    for annotation in content["annotations"]:
        if "expressions" in annotation:
            annotation["caption"] = annotation.pop("expressions")
    path = write_coco(tmp_path, content)
    with pytest.raises(ValueError, match="--text-key caption"):
        CocoExpressions(path)
    assert len(CocoExpressions(path, text_key="caption").images("train")[0].expressions) == 3


@pytest.mark.parametrize("texts", [[""], 5, ["a", 3], {"text": "a"}])
def test_texts_that_are_none(tmp_path, content, texts):
    content["annotations"][0]["expressions"] = texts
    with pytest.raises(ValueError, match="annotation 102 must have a text"):
        CocoExpressions(write_coco(tmp_path, content))


def test_unknown_annotations_and_images(tmp_path, content):
    path = write_coco(tmp_path, content)
    with pytest.raises(ValueError, match="names 1 annotations that .* does not have: 999"):
        CocoExpressions(path, write_coco(tmp_path, {"999": "x"}, "texts.json"))
    with pytest.raises(ValueError, match="must map annotation ids"):
        CocoExpressions(path, write_coco(tmp_path, ["x"], "texts.json"))
    content["annotations"][0]["image_id"] = 55
    with pytest.raises(ValueError, match="image 55, which is not there"):
        CocoExpressions(write_coco(tmp_path, content))


def test_coco_becomes_shards(tmp_path, content, handmade):
    folder = handmade.write_train2014(tmp_path)
    out = tmp_path / "shards"
    asked = [
        "shards",
        "convert",
        "--out",
        str(out),
        "--coco",
        str(write_coco(tmp_path, content)),
        "--images",
        str(folder),
    ]
    assert main(asked) == 0 and main(["shards", "validate", str(out)]) == 0
    shards = ShardSource(out)
    assert len(shards.instances(shards.images("train")[0])) == 4 and len(shards.images("train")[0].expressions) == 3


def test_the_documents_coco_example_is_read(tmp_path):
    document = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    example = json.loads(re.search(r"```json\n(.*?)```", document, re.DOTALL).group(1))
    (image,) = CocoExpressions(write_coco(tmp_path, example)).images("train")
    assert [one.text for one in image.expressions] == ["the cat", "cat on the left"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_a_coco_file_name_that_leads_out(tmp_path, content, name):
    for image in content["images"]:
        image["file_name"] = name
    with pytest.raises(ValueError, match="leads out of its folder"):
        CocoExpressions(write_coco(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": -1}, "id is -1"),
        ({"expressions": [5]}, "annotation 102 must have a text"),
        ({"expressions": "\ud800"}, "annotation 102 must have a text"),
        ({"image_id": float("inf")}, "annotation 102: image_id is inf"),
    ],
)
def test_wrong_coco_files(tmp_path, content, change, message):
    content["annotations"][0] |= change
    with pytest.raises(BadFileError, match=f"instances.json: .*{message}"):
        CocoExpressions(write_coco(tmp_path, content))


def test_a_split_that_is_no_text(tmp_path, content):
    content["images"][0]["split"] = 5
    with pytest.raises(BadFileError, match="image 7: 'split' must be a text"):
        CocoExpressions(write_coco(tmp_path, content))


@pytest.mark.parametrize("kind", [np.uint16, np.float32, np.int32])
def test_the_numbers_of_a_mask_image_need_not_be_white(write, tmp_path, kind):
    """Labels 1 and 2 of 65,535 are black once an image is scaled to 8 bits."""
    mask = np.zeros((20, 30), kind)
    mask[5:9, 3:7] = [1, 2, 1, 2]
    Image.fromarray(mask).save(tmp_path / "labels.tif")
    source = JsonlSource(
        write({"image": "photos/a.jpg", "expressions": [{"text": "the box", "segmentation": "labels.tif"}]})
    )
    (image,) = source.images("train")
    assert np.array_equal(source.target_mask(image, image.expressions[0]), mask > 0)
