"""The demo's photographs are drawn at random, with an expression of each that has a target."""

from __future__ import annotations

import demo_photos
import numpy as np

from lavis_svp.datasets.refcoco_writer import DatasetWriter, NewExpression


def test_photographs_and_expressions_are_drawn(tmp_path):
    writer = DatasetWriter(tmp_path, "refphotos", ["cup"], 10, 10)
    for number in range(1, 13):
        expressions = [
            NewExpression("the cup", "name", "name", 0, (0,)),
            NewExpression("the white cup", "attribute", "attribute", 0, (0,)),
            NewExpression("the dog", "no_target", "no_target", None, ()),
        ]
        objects = [("cup", np.ones((4, 4), np.uint8), [])]
        writer.add(number, f"{number:02d}.jpg", "test", objects, expressions)
    writer.write()
    drawn = demo_photos.draw(tmp_path, 5, 0)
    assert drawn == demo_photos.draw(tmp_path, 5, 0)
    assert len({path for path, _ in drawn}) == 5
    assert all(path.parent == tmp_path / "images/refphotos" for path, _ in drawn)
    texts = {text for seed in range(10) for _, text in demo_photos.draw(tmp_path, 5, seed)}
    assert texts == {"the cup", "the white cup"}
    assert len({tuple(demo_photos.draw(tmp_path, 5, seed)) for seed in range(5)}) > 1
