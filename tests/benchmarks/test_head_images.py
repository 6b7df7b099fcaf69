"""The list of photographs on which the shipped boundary head was trained."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import head_images
import held_out_photos
from superpixels import PHOTOS

from lavis_svp.common.files import read_json
from lavis_svp.datasets.refshapes import render

NOTICE = (Path(__file__).resolve().parents[2] / "NOTICE.md").read_text()


def test_the_notice_has_every_package_with_its_photographs():
    listed = read_json(head_images.PHOTOS)
    versions = {entry["package"]: entry["version"] for entry in listed["packages"]}
    counts = Counter(package for package, _ in listed["photos"])
    rows = {(name, version, int(count)) for name, version, count in re.findall(r"\| `(\S+)` (\S+) \| (\d+) \|", NOTICE)}
    assert {(name, version, counts[name]) for name, version in versions.items()} == rows
    assert len(listed["photos"]) == len({tuple(photo) for photo in listed["photos"]}) == 161


def test_nothing_that_is_tested_on_is_trained_on():
    packages = {entry["package"] for entry in read_json(head_images.PHOTOS)["packages"]}
    assert held_out_photos.TABLER.package not in packages
    tested = {*PHOTOS, *(Path(name).stem for split in ("val", "test") for name in render.PHOTOS[split])}
    assert not {Path(name).stem for name in head_images.UNTESTED} & tested
