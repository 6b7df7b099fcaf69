"""COCO-format instances with expressions, in the annotations or beside them."""

import json
import re
from pathlib import Path

import pytest

from lavis_svp.datasets.coco_expressions import CocoExpressions
from lavis_svp.datasets.shards.__main__ import main
from lavis_svp.datasets.shards.source import ShardSource


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


def write(tmp_path, content, name="instances.json"):
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


def test_expressions_of_annotations(tmp_path, content, handmade):
    source = CocoExpressions(write(tmp_path, content))
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
    beside = write(tmp_path, {str(handmade.CAT): ["kitty"]}, "texts.json")
    (image,) = CocoExpressions(write(tmp_path, content), beside).images("train")
    assert [one.text for one in image.expressions] == ["kitty"]
    for annotation in content["annotations"]:
        if "expressions" in annotation:
            annotation["caption"] = annotation.pop("expressions")
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match="--text-key caption"):
        CocoExpressions(path)
    assert len(CocoExpressions(path, text_key="caption").images("train")[0].expressions) == 3


@pytest.mark.parametrize("texts", [[""], 5, ["a", 3], {"text": "a"}])
def test_texts_that_are_none(tmp_path, content, texts):
    content["annotations"][0]["expressions"] = texts
    with pytest.raises(ValueError, match="annotation 102 must have a text"):
        CocoExpressions(write(tmp_path, content))


def test_unknown_annotations_and_images(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match="names 1 annotations that .* does not have: 999"):
        CocoExpressions(path, write(tmp_path, {"999": "x"}, "texts.json"))
    with pytest.raises(ValueError, match="must map annotation ids"):
        CocoExpressions(path, write(tmp_path, ["x"], "texts.json"))
    content["annotations"][0]["image_id"] = 55
    with pytest.raises(ValueError, match="image 55, which is not there"):
        CocoExpressions(write(tmp_path, content))


def test_they_become_shards(tmp_path, content, handmade):
    folder = handmade.write_train2014(tmp_path)
    out = tmp_path / "shards"
    asked = ["convert", "--out", str(out), "--coco", str(write(tmp_path, content)), "--images", str(folder)]
    assert main(asked) == 0 and main(["validate", str(out)]) == 0
    shards = ShardSource(out)
    assert len(shards.instances(7)) == 4 and len(shards.images("train")[0].expressions) == 3


def test_the_documents_example_is_read(tmp_path):
    document = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    example = json.loads(re.search(r"```json\n(.*?)```", document, re.DOTALL).group(1))
    (image,) = CocoExpressions(write(tmp_path, example)).images("train")
    assert [one.text for one in image.expressions] == ["the cat", "cat on the left"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_a_file_name_that_leads_out(tmp_path, content, name):
    for image in content["images"]:
        image["file_name"] = name
    with pytest.raises(ValueError, match="leads out of its folder"):
        CocoExpressions(write(tmp_path, content))
