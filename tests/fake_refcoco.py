"""Make small RefCOCO, RefCOCO+ and RefCOCOg trees in the true format: ``python tests/fake_refcoco.py --root DIR``.

As published: ``<root>/refcoco/{instances.json, refs(unc).p}`` and so on, pickles with Python 2's byte strings, all
annotations of the images (referred to or not, a crowd's uncompressed run lengths among them), images as
``<root>/images/mscoco/images/train2014/COCO_train2014_%012d.jpg``. RefCOCO and RefCOCO+ share their images; some of
RefCOCOg's training images are held out in RefCOCO, as in the true ones. Drawn and written from the seed alone.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IMAGES = "images/mscoco/images/train2014"
CATEGORIES = {"person": 1, "car": 3, "dog": 18, "cup": 47, "chair": 62}
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 210), "yellow": (235, 205, 40)}
CYCLE = ("train", "val", "testA", "testB", *("train",) * 6)
"""Splits of RefCOCO's images, again and again."""
CYCLE_G = ("train", "val", "test", *("train",) * 7)
SENTENCE_START = {"refcoco": 0, "refcoco+": 100_000, "refcocog": 200_000}
PEOPLE, THINGS = "testA", "testB"


@dataclass(frozen=True)
class Thing:
    """One drawn object: its annotation, and the words that tell it."""

    annotation: dict[str, Any]
    category: str
    colour: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """One image and everything in it."""

    image: dict[str, Any]
    things: list[Thing]
    crowd: list[dict[str, Any]]


def make_tree(root: Path, references: int = 300, seed: int = 0) -> Path:
    """Write the three data sets and their images; what is there already is written again, the same.

    Args:
        root: the folder that gets ``refcoco/``, ``refcoco+/``, ``refcocog/`` and ``images/``.
        references: of each data set; at least 12, so that no split is empty.
        seed: of everything.

    Returns:
        The root.
    """
    if references < 12:
        raise ValueError(f"Fewer than 12 references leave a split empty, got {references}.")
    root = Path(root)
    folder = root / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    scenes: dict[int, Scene] = {}

    def scene(number: int) -> Scene:
        if number not in scenes:
            scenes[number] = draw_scene(number, seed, folder)
        return scenes[number]

    def partly_shared(number: int) -> Scene:  # every other image of RefCOCOg is one of RefCOCO, whatever its split
        return scene(1 + number * 3 // 2) if number % 2 == 0 else scene(1_000_000 + number)

    for name, partition, cycle, source, words in (
        ("refcoco", "unc", CYCLE, scene, _with_place),
        ("refcoco+", "unc", CYCLE, scene, _without_place),
        ("refcocog", "umd", CYCLE_G, partly_shared, _in_full),
    ):
        used, refs = make_references(name, references, cycle, source, words, seed)
        write_dataset(root / name, f"refs({partition}).p", used, refs)
    return root


def draw_scene(number: int, seed: int, folder: Path) -> Scene:
    """Draw one image into ``folder`` and say what is in it."""
    rng = np.random.default_rng([seed, number])
    width, height = int(rng.integers(72, 129)), int(rng.integers(64, 105))
    image_id = 1 + number * 37 % 581_921 + 581_921 * (number // 581_921)
    pixels = rng.integers(90, 150, (height, width, 1), dtype=np.uint8).repeat(3, axis=2)
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    things = []
    for place in range(int(rng.integers(3, 6))):
        # one person and one other thing at least, so that testA and testB can be made of any image
        category = ("person", "dog")[place] if place < 2 else str(rng.choice(list(CATEGORIES)))
        colour = str(rng.choice(list(COLOURS)))
        polygons = _outline(category, width, height, rng)
        for polygon in polygons:
            draw.polygon(polygon, fill=COLOURS[colour])
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])  # (P, 2)
        low, high = points.min(0), points.max(0)
        annotation = {
            "segmentation": polygons,
            "area": float(np.round((high - low).prod(), 2)),
            "iscrowd": 0,
            "image_id": image_id,
            "bbox": [float(value) for value in np.round([*low, *(high - low)], 2)],
            "category_id": CATEGORIES[category],
            "id": image_id * 10 + place,
        }
        things.append(Thing(annotation, category, colour, (float(points[:, 0].mean()), float(points[:, 1].mean()))))
    crowd = [_crowd(image_id, height, width)] if number % 5 == 0 else []
    name = f"COCO_train2014_{image_id:012d}.jpg"
    canvas.save(folder / name, quality=92)
    image = {"license": 1, "file_name": name, "height": height, "width": width, "id": image_id}
    return Scene(image, things, crowd)


def make_references(
    name: str,
    count: int,
    cycle: tuple[str, ...],
    source: Callable[[int], Scene],
    words: Callable[[Thing, Scene], list[str]],
    seed: int,
) -> tuple[list[Scene], list[dict[str, Any]]]:
    """References of one data set, and the scenes that they are about."""
    scenes, refs = [], []
    sentence_id = SENTENCE_START[name]
    while len(refs) < count:
        number = len(scenes)
        scene, split = source(number), cycle[number % len(cycle)]
        scenes.append(scene)
        chosen = [
            thing
            for thing in scene.things
            if split not in (PEOPLE, THINGS) or (thing.category == "person") == (split == PEOPLE)
        ]
        rng = np.random.default_rng([seed, SENTENCE_START[name], number])
        for thing in chosen[: int(rng.integers(1, 4))][: count - len(refs)]:
            texts = words(thing, scene)
            ids = list(range(sentence_id, sentence_id + len(texts)))
            sentence_id += len(texts)
            annotation_id, image_id = thing.annotation["id"], scene.image["id"]
            refs.append(
                {
                    "sent_ids": ids,
                    "file_name": f"COCO_train2014_{image_id:012d}_{annotation_id}.jpg",
                    "ann_id": annotation_id,
                    "ref_id": len(refs),
                    "image_id": image_id,
                    "split": split,
                    "sentences": [
                        {"tokens": text.split(), "raw": text.capitalize(), "sent_id": sent_id, "sent": text}
                        for sent_id, text in zip(ids, texts, strict=True)
                    ],
                    "category_id": thing.annotation["category_id"],
                }
            )
    return scenes, refs


def write_dataset(folder: Path, refs_name: str, scenes: list[Scene], refs: list[dict[str, Any]]) -> None:
    """Write the two annotation files."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations = [one for scene in scenes for one in [*(thing.annotation for thing in scene.things), *scene.crowd]]
    content = {
        "info": {"description": "drawn by tests/fake_refcoco.py", "year": 2014},
        "licenses": [{"id": 1, "name": "none", "url": ""}],
        "images": [scene.image for scene in scenes],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "person" if name == "person" else "thing"}
            for name, number in CATEGORIES.items()
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    with open(folder / refs_name, "wb") as file:
        _Python2Pickler(file, protocol=2).dump(refs)


class _Python2Pickler(pickle._Pickler):
    """Writes text as the byte strings that Python 2 had, as in the published files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def _save_byte_string(self, text: str) -> None:
        data = text.encode("latin1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    dispatch[str] = _save_byte_string


def _outline(category: str, width: int, height: int, rng: np.random.Generator) -> list[list[float]]:
    """Polygons of one object: people are ellipses, cups are in two parts, as behind something, the rest are boxes."""
    w, h = float(rng.uniform(14, 30)), float(rng.uniform(14, 30))
    x, y = float(rng.uniform(1, width - w - 1)), float(rng.uniform(1, height - h - 1))
    if category == "person":
        angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        points = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)  # (12, 2)
        return [[float(value) for value in np.round(points, 2).ravel()]]
    parts = [(x, w * 0.4), (x + w * 0.6, w * 0.4)] if category == "cup" else [(x, w)]
    boxes = [[left, y, left + wide, y, left + wide, y + h, left, y + h] for left, wide in parts]
    return [[round(value, 2) for value in box] for box in boxes]


def _crowd(image_id: int, height: int, width: int) -> dict[str, Any]:
    """People along the lower edge, as COCO writes a crowd: uncompressed run lengths, down the columns."""
    band = 4
    counts = [height - band, band] * width
    return {
        "segmentation": {"counts": counts, "size": [height, width]},
        "area": band * width,
        "iscrowd": 1,
        "image_id": image_id,
        "bbox": [0, height - band, width, band],
        "category_id": CATEGORIES["person"],
        "id": image_id * 10 + 9,
    }


def _side(thing: Thing, scene: Scene) -> str:
    return "left" if thing.centre[0] < scene.image["width"] / 2 else "right"


def _with_place(thing: Thing, scene: Scene) -> list[str]:
    side = _side(thing, scene)
    return [f"{thing.colour} {thing.category} on the {side}", f"{side} {thing.category}", f"the {thing.colour} one"]


def _without_place(thing: Thing, scene: Scene) -> list[str]:
    return [f"{thing.colour} {thing.category}", f"the {thing.category} that is {thing.colour}"]


def _in_full(thing: Thing, scene: Scene) -> list[str]:
    other = next(one for one in scene.things if one is not thing)
    near = "above" if thing.centre[1] < other.centre[1] else "below"
    return [
        f"a {thing.colour} {thing.category} {near} a {other.colour} {other.category}",
        f"the {thing.colour} {thing.category} in the {_side(thing, scene)} half of the image",
    ]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--refs", type=int, default=300, help="references of each data set")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(make_tree(given.root, given.refs, given.seed))


if __name__ == "__main__":
    main()
