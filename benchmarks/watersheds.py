"""Three watersheds on the shipped head's boundary strength: how long they take, and how good the regions are.

    lavis-svp superpixels train IMAGES --out OUT     prepares the records (IMAGES: head_images.py)
    python benchmarks/watersheds.py OUT/prepared     some minutes on one core, into results/watersheds.json

All get the same markers and the same merging (by the strength alone), on the records that training holds out, at side
384. Measured as in head_trials.py. OpenCV's watershed reads 8-bit images and leaves lines without a region, which here
go to the nearest one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from head_trials import region_ceilings
from results import store
from scipy import ndimage
from skimage.segmentation import watershed
from torch.nn import functional
from tqdm import tqdm

from lavis_svp.superpixels.one_pass.generator import label_scale
from lavis_svp.superpixels.one_pass.head import STRIDE, boundary_strength
from lavis_svp.superpixels.one_pass.hierarchy import MARKER_WINDOW, SMOOTHING, merge_regions_by_boundary
from lavis_svp.superpixels.one_pass.labels import read_record
from lavis_svp.superpixels.one_pass.training import held_out
from lavis_svp.superpixels.one_pass.weights import load_head
from lavis_svp.tasks.base import run_facts

SIDE, HEAD, REPEATS = 384, "one_pass_mobile_sam", 5
LEVELS = 255  # of an 8-bit image


def opencv(smooth: np.ndarray, markers: np.ndarray) -> np.ndarray:
    """OpenCV's watershed, its lines given to the nearest region."""
    grey = np.round(smooth * LEVELS).astype(np.uint8)
    found = cv2.watershed(np.repeat(grey[..., None], 3, axis=2), markers.copy())  # (H', W'), -1 on lines
    place = ndimage.distance_transform_edt(found < 1, return_distances=False, return_indices=True)
    return found[tuple(place)]


WATERSHEDS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "scikit-image, `watershed` (used)": watershed,
    "scipy, `watershed_ift`": lambda smooth, markers: ndimage.watershed_ift(
        np.round(smooth * LEVELS).astype(np.uint8), markers, structure=np.ones((3, 3))
    ),
    "OpenCV, `watershed`": opencv,
}


@torch.no_grad()
def strength_of(path: Path) -> np.ndarray:
    """The strength (H', W') of a record's image, enlarged as the generator does."""
    record = read_record(path, [SIDE])
    height, width = record.images[SIDE].shape[1:]
    cells = SIDE // STRIDE
    image = functional.pad(record.images[SIDE].float() / 255, (0, cells - width, 0, cells - height))
    output = load_head(HEAD).head(record.embeddings[SIDE].float()[None], image[None])
    strength = boundary_strength(output.boundaries)[:, None, :height, :width]  # (1, 1, h, w)
    return functional.interpolate(strength, scale_factor=label_scale(SIDE), mode="bilinear")[0, 0].numpy()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="folder of prepared records")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, apart = held_out(sorted(args.records.glob("*.safetensors")))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WATERSHEDS}
    for path in tqdm(apart, "images"):
        strength = strength_of(path)
        smooth = ndimage.gaussian_filter(strength, SMOOTHING, mode="nearest")
        lowest = ndimage.minimum_filter(smooth, MARKER_WINDOW, mode="nearest") == smooth
        markers, _ = ndimage.label(lowest, structure=np.ones((3, 3)), output=np.int32)
        labels = read_record(path, [SIDE]).labels.numpy()
        for name, flood in WATERSHEDS.items():
            seconds = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                basins = flood(smooth, markers)
                seconds.append(time.perf_counter() - start)
            _, numbers = np.unique(basins, return_inverse=True)  # some markers get no region
            hierarchy = merge_regions_by_boundary(numbers.reshape(basins.shape).astype(np.int32), strength)  # (H', W')
            rows[name].append({"ms": statistics.median(seconds) * 1e3} | region_ceilings(hierarchy, labels))
    means = {
        name: {key: round(statistics.fmean(row[key] for row in found), 4) for key in found[0]}
        for name, found in rows.items()
    }
    facts = {**run_facts(), "command": "python benchmarks/watersheds.py OUT/prepared"}
    print(store("watersheds", {"run": facts, "side": SIDE, "images": len(apart), "watersheds": means}))


if __name__ == "__main__":
    main()
