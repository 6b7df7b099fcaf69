"""Superpixels without a network: felzenszwalb and slic by colour, grid and voronoi by position alone.

Each generator is a dataclass of its options. All work on the image shrunk to a longest side of ``side`` pixels (never
enlarged), return labels at that resolution, and cover the whole image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageFilter
from scipy.spatial import cKDTree
from skimage.color import rgb2lab
from skimage.segmentation import felzenszwalb, slic

from lavis_svp.common.options import build_options
from lavis_svp.superpixels.generator import SuperpixelGenerator, generator_registry
from lavis_svp.superpixels.merging import merge_regions
from lavis_svp.superpixels.region_map import RegionMap

_LAB_WHITE = 100.0
"""Lab lightness of white; felzenszwalb's ``scale`` is meant for values in 0..1."""


@dataclass(frozen=True)
class ClassicalGenerator(SuperpixelGenerator):
    """Base of the generators that need no network.

    Args:
        side: longest side of the working image in pixels; the time grows with its square.

    Raises:
        ValueError: an option is out of range.
    """

    MINIMUM: ClassVar[dict[str, float]] = {}
    """The smallest sensible value of each option; None passes."""

    side: int = 168

    def __post_init__(self) -> None:
        for name, minimum in {"side": 1, **self.MINIMUM}.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"{self.name}: {name} must be at least {minimum}, got {value}.")

    def settings(self) -> dict[str, Any]:
        """The generator's name, its version and all its options."""
        return {"generator": self.name, "version": self.version, **dataclasses.asdict(self)}

    def segment_batch(self, sources: Sequence[np.ndarray]) -> list[RegionMap]:
        """The superpixels of (H, W, 3) uint8 images."""
        return [RegionMap.from_labels(self.label(image)) for image in sources]

    @abstractmethod
    def label(self, image: np.ndarray) -> np.ndarray:
        """Label map (H', W') of one (H, W, 3) uint8 image, any non-negative numbers."""

    def working_size(self, image: np.ndarray) -> tuple[int, int]:
        """(H', W') of the image shrunk to a longest side of ``side``, each at least 1; never enlarged."""
        height, width = image.shape[:2]
        factor = min(1.0, self.side / max(height, width))
        return max(1, round(height * factor)), max(1, round(width * factor))

    def working_image(self, image: np.ndarray) -> Image.Image:
        """The image at its working size."""
        return Image.fromarray(image).resize(self.working_size(image)[::-1], Image.Resampling.BILINEAR)


def _register(cls: type[ClassicalGenerator]) -> type[ClassicalGenerator]:
    def build(**options: Any) -> SuperpixelGenerator:
        return build_options(cls, options, f"the options of superpixels '{cls.name}'")

    generator_registry.register(cls.name)(build)
    return cls


@_register
@dataclass(frozen=True)
class FelzenszwalbSuperpixels(ClassicalGenerator):
    """Regions of like colour, of any shape and size: Felzenszwalb and Huttenlocher 2004 on Lab colours, then merging.

    Defaults chosen on 60 RefShapes training images; on 60 held-out ones the best single region of an object has
    IoU 0.93 on average, with 13 regions per image. ``merge_cost`` 0 with ``max_regions`` n gives n regions per image.

    Args:
        close: side in working pixels (odd) of a grey closing that fills dark stripes and dots thinner than it; 0 = off.
        sigma: width of the Gaussian before the graph is cut, working pixels; much of it makes rims along edges.
        scale: felzenszwalb's preference for large regions (colours in 0..1).
        min_area: regions below this share of the image are joined to a neighbour at once.
        merge_cost: see :func:`~lavis_svp.superpixels.merging.merge_regions`, Lab units squared x share of the image.
        max_regions: merging goes on until at most this many are left; None = no limit.
    """

    name = "felzenszwalb"
    MINIMUM = {"close": 0, "sigma": 0, "scale": 0, "min_area": 0, "merge_cost": 0, "max_regions": 1}

    close: int = 3
    sigma: float = 0.4
    scale: float = 50.0
    min_area: float = 1.5e-3
    merge_cost: float = 1.5
    max_regions: int | None = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.close and self.close % 2 == 0:
            raise ValueError(f"{self.name}: close must be odd (or 0 for none), got {self.close}.")

    @property
    def region_limit(self) -> int | None:
        """See :attr:`SuperpixelGenerator.region_limit`."""
        return self.max_regions

    def label(self, image: np.ndarray) -> np.ndarray:
        """Shrink, close dark texture, cut the graph, merge."""
        working = self.working_image(image)
        if self.close:
            working = working.filter(ImageFilter.MaxFilter(self.close)).filter(ImageFilter.MinFilter(self.close))
        colours = rgb2lab(np.asarray(working))  # (H', W', 3)
        min_size = round(self.min_area * colours.shape[0] * colours.shape[1])
        labels = felzenszwalb(colours / _LAB_WHITE, scale=self.scale, sigma=self.sigma, min_size=min_size)
        return merge_regions(labels, colours, self.merge_cost, self.max_regions)


@_register
@dataclass(frozen=True)
class SlicSuperpixels(ClassicalGenerator):
    """Compact pieces of like colour and about equal size: SLIC (Achanta et al. 2012).

    Args:
        n_segments: target number of pieces; SLIC makes about that many.
        compactness: weight of distance against difference of colour.
        sigma: width of the Gaussian before, working pixels.
        merge_cost: merge pieces of like colour afterwards, as for felzenszwalb; 0 = off.
        max_regions: merging goes on until at most this many are left; None = no limit.
    """

    name = "slic"
    MINIMUM = {"n_segments": 1, "sigma": 0, "merge_cost": 0, "max_regions": 1}

    n_segments: int = 40
    compactness: float = 10.0
    sigma: float = 1.0
    merge_cost: float = 0.0
    max_regions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compactness <= 0:
            raise ValueError(f"{self.name}: compactness must be greater than 0, got {self.compactness}.")

    @property
    def region_limit(self) -> int | None:
        """See :attr:`SuperpixelGenerator.region_limit`."""
        return self.max_regions

    def label(self, image: np.ndarray) -> np.ndarray:
        """Shrink, cluster, and merge if the options say so."""
        colours = rgb2lab(np.asarray(self.working_image(image)))  # (H', W', 3)
        options = {"n_segments": self.n_segments, "compactness": self.compactness, "sigma": self.sigma}
        labels = slic(colours, **options, convert2lab=False, start_label=0)
        if self.merge_cost == 0 and self.max_regions is None:
            return labels
        return merge_regions(labels, colours, self.merge_cost, self.max_regions)


@_register
@dataclass(frozen=True)
class GridSuperpixels(ClassicalGenerator):
    """Cells of a regular grid; an image with fewer working pixels than cells gets one cell per pixel.

    Args:
        rows: cells from top to bottom.
        cols: cells from left to right.
    """

    name = "grid"
    MINIMUM = {"rows": 1, "cols": 1}

    rows: int = 6
    cols: int = 6

    def label(self, image: np.ndarray) -> np.ndarray:
        """Number the cells."""
        height, width = self.working_size(image)
        rows = np.arange(height) * self.rows // height  # (H',)
        cols = np.arange(width) * self.cols // width  # (W',)
        return rows[:, None] * self.cols + cols  # (H', W')


@_register
@dataclass(frozen=True)
class VoronoiSuperpixels(ClassicalGenerator):
    """Cells around random points, the same points for the same image (its pixels are the seed).

    Args:
        n_segments: number of points; a cell without a pixel of its own is left out.
        seed: another seed gives other points.
    """

    name = "voronoi"
    MINIMUM = {"n_segments": 1, "seed": 0}

    n_segments: int = 36
    seed: int = 0

    def label(self, image: np.ndarray) -> np.ndarray:
        """Draw the points from the image's hash, give each pixel to the nearest."""
        height, width = self.working_size(image)
        digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest, "little")])
        points = rng.random((self.n_segments, 2)) * (height, width)  # (n, 2) y, x
        centres = np.moveaxis(np.indices((height, width)), 0, -1) + 0.5  # (H', W', 2)
        return cKDTree(points).query(centres)[1]  # (H', W')
