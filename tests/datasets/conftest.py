"""Hand-made data in the true RefCOCO layouts."""

import json
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import lavis_svp  # noqa: F401  (adapts LAVIS, so it goes before it)

HEIGHT, WIDTH = 40, 60
CAT, DOG, CROWD, EMPTY, OTHER = 101, 102, 103, 104, 201


def rle(mask, as_text=True):
    """Compressed RLE of a mask, counts as str or bytes."""
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode() if as_text else code["counts"]}


def block(top, left, bottom, right, size=(HEIGHT, WIDTH)):
    """A mask that is 1 in a rectangle."""
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def instances():
    """Two images; the first with overlapping polygons, RLE text, a crowd and an empty segmentation."""
    crowd = block(30, 0, 40, 60)
    runs = np.flatnonzero(np.diff(np.concatenate([[2], crowd.T.ravel(), [2]])))
    counts = ([0] if crowd.T.ravel()[0] else []) + np.diff(runs).tolist()
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 3, "file_name": "COCO_train2014_000000000003.jpg", "height": 20, "width": 30},
        ],
        "annotations": [
            {
                "id": DOG,
                "image_id": 7,
                "category_id": 18,
                "iscrowd": 0,
                "segmentation": rle(block(5, 40, 15, 55)),
                "bbox": [40, 5, 15, 10],
                "area": 150,
                "attributes": ["brown"],
            },
            {
                "id": CAT,
                "image_id": 7,
                "category_id": 17,
                "iscrowd": 0,
                "segmentation": [[5, 5, 25, 5, 25, 20, 5, 20], [15, 10, 35, 10, 35, 25, 15, 25]],
                "bbox": [5, 5, 30, 20],
                "area": 450,
            },
            {
                "id": CROWD,
                "image_id": 7,
                "category_id": 1,
                "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
            },
            {"id": EMPTY, "image_id": 7, "category_id": 1, "iscrowd": 0, "segmentation": []},
            {
                "id": OTHER,
                "image_id": 3,
                "category_id": 18,
                "iscrowd": 0,
                "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]],
            },
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "hot dog"}],
    }


def ref(ref_id, ann_id, image_id, split, *sentences, first_sentence=0, **extra):
    """One reference as REFER's files have it."""
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "split": split,
        "category_id": 18,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
        "sent_ids": list(range(first_sentence, first_sentence + len(sentences))),
        "sentences": [
            {"sent_id": first_sentence + i, "sent": text, "raw": text.title(), "tokens": text.split()} | extra
            for i, text in enumerate(sentences)
        ],
    }


def refcoco_refs():
    """Not sorted on purpose; every split of RefCOCO."""
    return [
        ref(12, DOG, 7, "train", "brown dog", "dog on the right", first_sentence=30),
        ref(4, CAT, 7, "train", "the cat", "left cat", "animal left of the dog", first_sentence=10),
        ref(5, OTHER, 3, "train", "the dog", first_sentence=20),
        ref(6, OTHER, 3, "val", "a dog", first_sentence=21),
        ref(8, CROWD, 7, "testA", "the people", first_sentence=22),
        ref(9, DOG, 7, "testB", "the dog again", first_sentence=23),
    ]


def write_image(path, size, seed=0):
    """A noisy RGB image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_annotations(root, folder, refs, refs_name, content=None):
    """Write ``<root>/<folder>/{instances.json, refs...}``."""
    where = Path(root) / folder
    where.mkdir(parents=True, exist_ok=True)
    (where / "instances.json").write_text(json.dumps(content or instances()))
    if refs_name.endswith(".json"):
        (where / refs_name).write_text(json.dumps(refs))
    else:
        with open(where / refs_name, "wb") as file:
            pickle.dump(refs, file, protocol=0)  # as Python 2 wrote them
    return where


def write_train2014(root, images="images/mscoco/images/train2014"):
    """The images of ``instances``."""
    for number, image in enumerate(instances()["images"]):
        write_image(Path(root) / images / image["file_name"], (image["height"], image["width"]), number)
    return Path(root) / images


@pytest.fixture
def refcoco_root(tmp_path):
    """A root with RefCOCO (unc) and its images, in REFER's layout."""
    write_annotations(tmp_path, "refcoco", refcoco_refs(), "refs(unc).p")
    write_train2014(tmp_path)
    return tmp_path


@pytest.fixture
def handmade():
    """The helpers and ids above, for tests that make their own data."""
    helpers = [rle, block, instances, ref, refcoco_refs, write_image, write_annotations, write_train2014]
    ids = {"CAT": CAT, "DOG": DOG, "CROWD": CROWD, "EMPTY": EMPTY, "OTHER": OTHER}
    return types.SimpleNamespace(**{helper.__name__: helper for helper in helpers}, **ids)
