"""Superpixels without a network: felzenszwalb and slic by colour, grid and voronoi by position alone.

All of them work on the image shrunk to a longest side of ``side`` pixels (never enlarged) and return labels at
that resolution; they cover the whole image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
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


def _at_least(options: Any, **least: float) -> None:
    """Refuse options below their smallest sensible value; None passes.

    Raises:
        ValueError: names the option, its value and the bound.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{type(options).__name__}.{name} must be at least {bound}, got {value}.")


@dataclass(frozen=True)
class FelzenszwalbOptions:
    """Felzenszwalb and Huttenlocher 2004 on Lab colours, then merging by colour (:mod:`.merging`).

    Defaults chosen on 60 RefShapes training images; on 60 held-out ones the best single region of an object has
    IoU 0.93 on average, with 13 regions an image. ``merge_cost`` 0 with ``max_regions`` n gives n regions an image.

    Args:
        side: longest side of the working image in pixels; the time grows with its square.
        close: side in working pixels (odd) of a grey closing that fills dark stripes and dots thinner than it; 0 = off.
        sigma: width of the Gaussian before the graph is cut, working pixels; much of it makes rims along edges.
        scale: felzenszwalb's preference for large regions (colours in 0..1).
        min_area: regions below this share of the image are joined to a neighbour at once.
        merge_cost: see :func:`~lavis_svp.superpixels.merging.merge_regions`, Lab units squared x share of the image.
        max_regions: merging goes on until at most this many are left; None = no limit.
    """

    side: int = 168
    close: int = 3
    sigma: float = 0.4
    scale: float = 50.0
    min_area: float = 1.5e-3
    merge_cost: float = 1.5
    max_regions: int | None = 40

    def __post_init__(self) -> None:
        _at_least(self, side=1, close=0, sigma=0, scale=0, min_area=0, merge_cost=0, max_regions=1)
        if self.close and self.close % 2 == 0:
            raise ValueError(f"FelzenszwalbOptions.close must be odd (or 0 for none), got {self.close}.")


@dataclass(frozen=True)
class SlicOptions:
    """SLIC (Achanta et al. 2012): about equal pieces of like colour.

    Args:
        side: longest side of the working image in pixels.
        n_segments: target number of pieces; SLIC makes about that many.
        compactness: weight of distance against difference of colour.
        sigma: width of the Gaussian before, working pixels.
        merge_cost: merge pieces of like colour afterwards, as for felzenszwalb; 0 = off.
        max_regions: merging goes on until at most this many are left; None = no limit.
    """

    side: int = 168
    n_segments: int = 40
    compactness: float = 10.0
    sigma: float = 1.0
    merge_cost: float = 0.0
    max_regions: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, side=1, n_segments=1, sigma=0, merge_cost=0, max_regions=1)
        if self.compactness <= 0:
            raise ValueError(f"SlicOptions.compactness must be greater than 0, got {self.compactness}.")


@dataclass(frozen=True)
class GridOptions:
    """A regular grid; an image with fewer working pixels than cells gets one cell a pixel.

    Args:
        rows: cells from top to bottom.
        cols: cells from left to right.
        side: longest side of the label map in pixels.
    """

    rows: int = 6
    cols: int = 6
    side: int = 168

    def __post_init__(self) -> None:
        _at_least(self, rows=1, cols=1, side=1)


@dataclass(frozen=True)
class VoronoiOptions:
    """Cells around random points, the same points for the same image (its pixels are the seed).

    Args:
        n_segments: number of points; a cell without a pixel of its own is left out.
        seed: another seed gives other points.
        side: longest side of the label map in pixels.
    """

    n_segments: int = 36
    seed: int = 0
    side: int = 168

    def __post_init__(self) -> None:
        _at_least(self, n_segments=1, seed=0, side=1)


class ClassicalGenerator(SuperpixelGenerator):
    """Base of the generators that need no network.

    Args:
        options: fields of the generator's options class.

    Raises:
        ValueError: an unknown option, or a value out of range.
    """

    options_class: ClassVar[type]

    def __init__(self, **options: Any) -> None:
        self.options: Any = build_options(self.options_class, options, f"the options of superpixels '{self.name}'")

    def settings(self) -> dict[str, Any]:
        """The generator's name, its version and all its options."""
        return {"generator": self.name, "version": self.version, **dataclasses.asdict(self.options)}

    def segment_image(self, image: np.ndarray) -> RegionMap:
        """The superpixels of one (H, W, 3) uint8 image."""
        return RegionMap.from_labels(self.label(image))

    @abstractmethod
    def label(self, image: np.ndarray) -> np.ndarray:
        """Label map (H', W') of one (H, W, 3) uint8 image, any non-negative numbers."""


@generator_registry.register("felzenszwalb")
class FelzenszwalbSuperpixels(ClassicalGenerator):
    """Regions of like colour, of any shape and size; see :class:`FelzenszwalbOptions`."""

    name = "felzenszwalb"
    options_class = FelzenszwalbOptions

    def label(self, image: np.ndarray) -> np.ndarray:
        """Shrink, close dark texture, cut the graph, merge."""
        options: FelzenszwalbOptions = self.options
        working = Image.fromarray(image).resize(working_size(image, options.side)[::-1], Image.Resampling.BILINEAR)
        if options.close:
            working = working.filter(ImageFilter.MaxFilter(options.close)).filter(ImageFilter.MinFilter(options.close))
        colours = rgb2lab(np.asarray(working))  # (H', W', 3)
        min_size = round(options.min_area * colours.shape[0] * colours.shape[1])
        labels = felzenszwalb(colours / _LAB_WHITE, scale=options.scale, sigma=options.sigma, min_size=min_size)
        return merge_regions(labels, colours, options.merge_cost, options.max_regions)


@generator_registry.register("slic")
class SlicSuperpixels(ClassicalGenerator):
    """Compact pieces of like colour and about equal size; see :class:`SlicOptions`."""

    name = "slic"
    options_class = SlicOptions

    def label(self, image: np.ndarray) -> np.ndarray:
        """Shrink, cluster, and merge if the options say so."""
        options: SlicOptions = self.options
        working = Image.fromarray(image).resize(working_size(image, options.side)[::-1], Image.Resampling.BILINEAR)
        colours = rgb2lab(np.asarray(working))  # (H', W', 3)
        labels = slic(
            colours,
            n_segments=options.n_segments,
            compactness=options.compactness,
            sigma=options.sigma,
            convert2lab=False,
            start_label=0,
        )
        if options.merge_cost == 0 and options.max_regions is None:
            return labels
        return merge_regions(labels, colours, options.merge_cost, options.max_regions)


@generator_registry.register("grid")
class GridSuperpixels(ClassicalGenerator):
    """Cells of a regular grid, whatever the image shows; see :class:`GridOptions`."""

    name = "grid"
    options_class = GridOptions

    def label(self, image: np.ndarray) -> np.ndarray:
        """Number the cells."""
        options: GridOptions = self.options
        height, width = working_size(image, options.side)
        rows = np.arange(height) * options.rows // height  # (H',)
        cols = np.arange(width) * options.cols // width  # (W',)
        return rows[:, None] * options.cols + cols  # (H', W')


@generator_registry.register("voronoi")
class VoronoiSuperpixels(ClassicalGenerator):
    """Cells around random points, whatever the image shows; see :class:`VoronoiOptions`."""

    name = "voronoi"
    options_class = VoronoiOptions

    def label(self, image: np.ndarray) -> np.ndarray:
        """Draw the points from the image's hash, give each pixel to the nearest."""
        options: VoronoiOptions = self.options
        height, width = working_size(image, options.side)
        digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
        rng = np.random.default_rng([options.seed, int.from_bytes(digest, "little")])
        points = rng.random((options.n_segments, 2)) * (height, width)  # (n, 2) y, x
        centres = np.moveaxis(np.indices((height, width)), 0, -1) + 0.5  # (H', W', 2)
        return cKDTree(points).query(centres)[1]  # (H', W')


def working_size(image: np.ndarray, side: int) -> tuple[int, int]:
    """(H', W') of an image shrunk to a longest side of ``side``, each at least 1; never enlarged."""
    height, width = image.shape[:2]
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))
