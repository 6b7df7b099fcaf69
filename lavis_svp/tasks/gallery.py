"""A gallery of an evaluation: drawn expressions of every kind, from different images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
from PIL import Image

from lavis_svp.common.visualization import contact_sheet, panel, save_png
from lavis_svp.metrics.masks import iou
from lavis_svp.metrics.records import Record
from lavis_svp.metrics.scores import image_of
from lavis_svp.models.outputs import MaskPrediction


class Gallery:
    """Collects drawn expressions, at most one of a kind from each image, and saves a mix of kinds and images.

    Args:
        size: number of panels to save.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._panels: dict[str, dict[Hashable, Image.Image]] = {}

    def offer(
        self, record: Record, read_image: Callable[[], np.ndarray], prediction: MaskPrediction, truth: np.ndarray
    ) -> None:
        """Draw an expression if its kind still needs one from this image.

        Args:
            record: of the expression.
            read_image: reads the image, (H, W, 3) uint8; called only if the expression is drawn.
            prediction: the model's answer.
            truth: (H, W) 0/1 mask.
        """
        panels, image = self._panels.setdefault(record["kind"], {}), image_of(record)
        if len(panels) >= self.size or image in panels:
            return
        labels = None if prediction.region_map is None else prediction.region_map.labels
        panels[image] = panel(read_image(), labels, prediction.mask, truth, caption(record))

    def chosen(self) -> list[Image.Image]:
        """Choose the panels to save: kinds take turns, and each takes the image that was shown least so far."""
        remaining = {kind: dict(panels) for kind, panels in sorted(self._panels.items())}
        shown: Counter[Hashable] = Counter()
        chosen: list[Image.Image] = []
        while len(chosen) < self.size and any(remaining.values()):
            for panels in filter(None, remaining.values()):
                image = min(panels, key=lambda image: shown[image])
                shown[image] += 1
                chosen.append(panels.pop(image))
        return chosen[: self.size]

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``folder/000.png``, ``001.png``, ... and all of them on one sheet, ``folder.png``.

        Older panels in the folder are removed first, so that two evaluations do not mix.
        """
        panels, target = self.chosen(), Path(folder)
        if not panels:
            return []
        for old in target.glob("[0-9]*.png"):
            old.unlink()
        paths = [save_png(target / f"{number:03d}.png", one) for number, one in enumerate(panels)]
        save_png(target.with_name(target.name + ".png"), contact_sheet(panels))
        return paths


def caption(record: Record) -> str:
    """The text under a panel: the expression, its kind, the answer's IoU, and the answer's words."""
    score = f"IoU {iou(record['intersection'], record['union']):.2f}"
    answer = f'answer "{record["text"]}"' if record["text"] else ("" if record["answered"] else "no [SEG]")
    return f'"{record["expression"]}"\n' + ", ".join(part for part in (record["kind"], score, answer) if part)
