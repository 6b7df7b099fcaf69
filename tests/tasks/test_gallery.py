"""The choice of images: all kinds, different images, no leftovers."""

import numpy as np
import pytest
from PIL import Image

from lavis_svp.tasks.gallery import Gallery, caption


@pytest.fixture
def offer(set_prediction):
    def offer(gallery, image_id, kind):
        record = {
            "image_id": image_id,
            "file_name": f"{image_id}.png",
            "kind": kind,
            "expression": f"the {kind} thing",
            "intersection": 1,
            "union": 2,
            "answered": True,
            "text": "",
        }
        drawn = []

        def image():
            drawn.append(image_id)
            return np.zeros((8, 8, 3), np.uint8)

        gallery.offer(record, image, set_prediction(np.ones((8, 8), np.uint8)), np.ones((8, 8), np.uint8))
        return bool(drawn)

    return offer


def test_kinds_take_turns_and_images_differ(offer):
    gallery = Gallery(4)
    drawn = [(image, kind) for image in range(5) for kind in "aab" if offer(gallery, image, kind)]
    assert drawn == [(image, kind) for image in range(4) for kind in "ab"]  # one of a kind per image, four at most
    assert len(gallery.chosen()) == 4
    rare = Gallery(4)
    for image in range(5):
        offer(rare, image, "common")
    offer(rare, 0, "rare")
    assert len(rare.chosen()) == 4
    assert next(iter(rare._panels["rare"].values())) in rare.chosen()


def test_images_repeat_only_when_there_are_no_others(offer):
    gallery = Gallery(4)
    for image in range(3):
        for kind in "ab":
            offer(gallery, image, kind)
    image_of = {id(one): image[0] for panels in gallery._panels.values() for image, one in panels.items()}
    assert [image_of[id(one)] for one in gallery.chosen()] == [0, 1, 2, 0]


def test_saved_images_replace_older_ones(offer, tmp_path):
    folder = tmp_path / "images" / "test"
    for wanted in (3, 2):
        gallery = Gallery(wanted)
        for image in range(wanted):
            offer(gallery, image, "a")
        gallery.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png"]
    assert Image.open(folder.parent / "test.png").height > 2 * Image.open(folder / "000.png").height


def test_no_images_wanted_draws_none(offer, tmp_path):
    gallery = Gallery(0)
    assert not offer(gallery, 0, "a")
    assert gallery.save(tmp_path / "none") == []
    assert list(tmp_path.iterdir()) == []


def test_caption_tells_kind_score_and_answer():
    record = {
        "expression": "the cup",
        "kind": "attribute",
        "intersection": 1,
        "union": 2,
        "answered": False,
        "text": "",
    }
    assert caption(record) == '"the cup"\nattribute, IoU 0.50, no [SEG]'
    assert caption({**record, "text": "No."}) == '"the cup"\nattribute, IoU 0.50, answer "No."'
