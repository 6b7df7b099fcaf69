"""An image classifier run over the whole image: dense features that are tied to words (not in the paper).

A convolutional classifier averages the features of its last layer over the image, and one linear layer makes class
scores of the mean. The mean over a superpixel instead says what *that* is. So a network that learned the 1,000 classes
of ImageNet knows nouns of real photographs, which a table (``imagenet_nouns.yaml``) turns into plain ones.

The network is timm's, which agrees bit for bit with the code that the weights were published with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torch.nn import functional

from lavis_svp.common.devices import DtypeName, check_dtype
from lavis_svp.common.files import BadFileError, one_line, read_json, read_yaml
from lavis_svp.common.options import check_whole_number, plain
from lavis_svp.common.tensor_files import load_state
from lavis_svp.common.tensors import no_autocast
from lavis_svp.vision.backbone import Fit, FrozenModule, PixelNorm, PixelSize, checked_image_sizes
from lavis_svp.vision.geometry import SamInputGeometry
from lavis_svp.vision.grid_places import Axes, axis_weights
from lavis_svp.vision.types import Grid
from lavis_svp.zoo import CLASSIFIERS, Weights, resolve

STRIDE = 32  # pixels of the scaled image along a cell of the features
WIDTH = 1280  # channels of the features
CLASSES = 1000
NOUNS_FILE = Path(__file__).parent / "imagenet_nouns.yaml"
LEAST_PROBABILITY = 1e-30  # of a noun, so that its logarithm is finite
LEAST_AREA = 1e-6  # of a region, or of what a patch shows of the image, in cells; padding has none
SAFETENSORS, CONFIG = "model.safetensors", "config.json"
MEND = "Fetch it again, or name another classifier."


@dataclass(frozen=True)
class ClassifierOptions:
    """The image classifier, which is built only where something reads it: an extra channel, or the pointer.

    Args:
        name: zoo name, or a local folder with a timm EfficientNet's ``config.json`` and ``model.safetensors``.
        side: pixels to which an image's longer side is scaled, a multiple of 32; a larger one finds smaller things.
        dtype: of its weights, as for the vision encoder. Features are float32 in any case, float16 in the cache.
    """

    name: str = "efficientnet_lite0"
    side: int = 640
    dtype: DtypeName = "auto"

    def __post_init__(self) -> None:
        check_dtype("model.classifier.dtype", self.dtype)
        check_whole_number("model.classifier.side", self.side, STRIDE)
        if self.side % STRIDE:
            lower = self.side // STRIDE * STRIDE
            raise ValueError(
                f"model.classifier.side is {self.side}; it must be a multiple of {STRIDE}. The nearest are {lower} and "
                f"{lower + STRIDE}."
            )


# ---------------------------------------------------------------- where the cells lie


def classifier_cells(image_size: PixelSize, side: int) -> Grid:
    """Rows and columns of cells that an image of (H, W) pixels gets at a side in pixels.

    The longer side gets all ``side / 32``, the other the nearest whole number, at least 1: the image is stretched a
    little (by 4 % at most for 4:3 at side 640), so that its cells cover it exactly and no padding enters the network.
    """
    most, longer = side // STRIDE, max(image_size)
    rows, columns = (max(1, int(most * length / longer + 0.5)) for length in image_size)
    return rows, columns


def classifier_axes(geometry: Sequence[SamInputGeometry], grids: Sequence[Grid], fit: Fit, side: int) -> list[Axes]:
    """The area weights that bring B images' features to their patch grids; on the CPU.

    A row sums to 1, or to 0 where a patch shows nothing of the image: a patch that is padding in part gets the mean of
    the rest.

    Args:
        geometry: where each image lies in SAM's input.
        grids: the (h, w) patch grid of each.
        fit: whether the grid covers the image alone (``stretch``) or all of SAM's input (``pad``).
        side: the classifier's, in pixels.
    """
    most = side // STRIDE
    axes = []
    for place, grid in zip(geometry, grids, strict=True):
        cells = classifier_cells(place.input_size, side)
        sizes = [1.0 if fit == "stretch" else 1.0 / share for share in place.extent]  # of the grid, in images
        rows, columns = (_axis(*one, most) for one in zip(grid, sizes, cells, strict=True))
        axes.append((rows, columns))
    return axes


def _axis(patches: int, size: float, cells: int, most: int) -> Tensor:
    """(patches, most) weights of an image's ``cells``, for patches over ``size`` of it."""
    weights = axis_weights(patches, size, cells)  # (patches, cells)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(LEAST_AREA)
    return functional.pad(weights, (0, most - cells))  # (patches, most)


# ---------------------------------------------------------------- the network


class DenseClassifier(FrozenModule):
    """Class features of every place of an image, and the classes of their means; frozen.

    Args:
        network: a timm EfficientNet of stride 32 with 1,280 features and 1,000 classes.
        side: pixels to which an image's longer side is scaled, a multiple of 32.
        mean: of red, green and blue, for pixels in 0..1.
        std: likewise.
    """

    def __init__(self, network: EfficientNet, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.side = side
        self.grid = (side // STRIDE, side // STRIDE)
        self.pixel_norm = PixelNorm(mean, std)
        self.freeze()

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the network, by ``torch.compile`` with these options; the names of its tensors stay."""
        self.network.compile(*args, **options)

    @torch.no_grad()
    def forward(self, pixels: Tensor, image_sizes: Sequence[PixelSize] | None = None) -> Tensor:
        """Features of images. Images of one size go through the network together, each without any padding.

        Args:
            pixels: (B, 3, H, W) RGB in 0..1; each image top-left, padding elsewhere.
            image_sizes: rows and columns of (H, W) that each image takes; None: all.

        Returns:
            (B, 1280, h, w) float32 on the ``grid``, each image on its :func:`classifier_cells` at the top left, zeros
            elsewhere.

        Raises:
            ValueError: sizes that do not fit the pixels.
        """
        sizes = checked_image_sizes(pixels, image_sizes)
        by_size: dict[PixelSize, list[int]] = {}
        for index, size in enumerate(sizes):
            by_size.setdefault(size, []).append(index)
        maps = [pixels] * len(sizes)
        for (height, width), group in by_size.items():
            images = torch.stack([pixels[index, :, :height, :width] for index in group])  # (G, 3, height, width)
            for index, features in zip(group, self._features(images), strict=True):
                rows, columns = (most - own for most, own in zip(self.grid, features.shape[1:], strict=True))
                maps[index] = functional.pad(features, (0, columns, 0, rows))  # (1280, h, w)
        return torch.stack(maps)  # (B, 1280, h, w)

    def _features(self, images: Tensor) -> Tensor:
        """(G, 1280, rows, columns) float32 of images (G, 3, H, W) that are all image."""
        cells = classifier_cells((images.shape[2], images.shape[3]), self.side)
        size = [STRIDE * count for count in cells]
        with no_autocast(images.device):
            images = self.pixel_norm(images)
            images = functional.interpolate(images, size, mode="bilinear", antialias=True)  # (G, 3, *size)
            features: Tensor = self.network.forward_features(images.to(next(self.network.parameters()).dtype))
            return features.float()

    def class_log_probs(self, features: Tensor) -> Tensor:
        """Logarithms of the class probabilities of mean features.

        Args:
            features: (..., 1280), means of features over some area.

        Returns:
            (..., 1000) float32, which the network's own last layer and a softmax give.
        """
        last = self.network.get_classifier()
        with no_autocast(features.device):
            scores = functional.linear(features.float(), last.weight.float(), last.bias.float())  # (..., 1000)
            return scores.log_softmax(-1)


def build_classifier(
    name_or_path: str | os.PathLike[str],
    side: int = ClassifierOptions.side,
    weights: Weights = "load",
    dtype: torch.dtype = torch.float32,
) -> DenseClassifier:
    """Build a frozen classifier.

    Args:
        name_or_path: as in :class:`ClassifierOptions`.
        side: likewise.
        weights: "none" builds it on the meta device.
        dtype: of the weights.

    Raises:
        UnknownNameError: neither a name of the zoo nor a folder.
        FileNotFoundError: no such folder, or it lacks a file.
        BadFileError: a file is damaged, or the network is none that fits.
    """
    if weights == "none" and os.fspath(name_or_path) in CLASSIFIERS:
        return _skeleton(CLASSIFIERS[os.fspath(name_or_path)], name_or_path, side, dtype)
    folder = resolve(name_or_path)
    if not isinstance(folder, Path):
        raise FileNotFoundError(
            f"A classifier is built from a local folder, not from the hub id '{folder}'. Give the folder, or one of: "
            f"{', '.join(CLASSIFIERS)}."
        )
    built = _skeleton(read_json(folder / CONFIG, MEND), folder, side, dtype)
    if weights == "load":
        state = load_state(folder / SAFETENSORS, MEND)
        try:
            built.network.load_state_dict({name: _cast(value, dtype) for name, value in state.items()}, assign=True)
        except RuntimeError as error:
            raise BadFileError(f"{folder / SAFETENSORS} holds another network ({one_line(error)}). {MEND}") from error
        built.pixel_norm = PixelNorm(**built.pixel_norm.values)
        built.freeze()
    return built


def _skeleton(config: Any, where: str | os.PathLike[str], side: int, dtype: torch.dtype) -> DenseClassifier:
    """A classifier on the meta device, from what its ``config.json`` says."""
    try:
        name, colours = config["architecture"], config["pretrained_cfg"]
        mean, std = ([float(value) for value in colours[key]] for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(
            f"The {CONFIG} of {where} lacks timm's architecture, or mean and std in pretrained_cfg. {MEND}"
        ) from error
    if not isinstance(name, str) or not timm.is_model(name):  # never a hub id, which timm would fetch
        raise BadFileError(f"The {CONFIG} of {where} names the architecture {name!r}, which timm does not have. {MEND}")
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False).to(dtype)
        fits = isinstance(network, EfficientNet) and (network.num_features, network.num_classes) == (WIDTH, CLASSES)
        if not fits or network.feature_info[-1]["reduction"] != STRIDE:
            raise BadFileError(
                f"The {CONFIG} of {where} names {name}; a classifier must be an EfficientNet of stride {STRIDE} with "
                f"{WIDTH} features and {CLASSES} classes, such as tf_efficientnet_lite0. {MEND}"
            )
        return DenseClassifier(network, side, mean, std)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


# ---------------------------------------------------------------- classes and nouns


class ClassNouns(nn.Module):
    """Which plain nouns name the things of which class.

    Args:
        by_class: the nouns of each of C classes, in lower case.

    Attributes:
        nouns: all V nouns, in the order of the alphabet.
        matrix: (C, V) float32, 1 where a class has a noun.
    """

    matrix: Tensor

    def __init__(self, by_class: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.by_class = [list(nouns) for nouns in by_class]
        self.nouns = sorted({noun for nouns in self.by_class for noun in nouns})
        self.index: Mapping[str, int] = {noun: index for index, noun in enumerate(self.nouns)}
        matrix = torch.zeros(len(self.by_class), len(self.nouns), device="cpu")
        for row, nouns in zip(matrix, self.by_class, strict=True):
            row[[self.index[noun] for noun in nouns]] = 1.0
        self.register_buffer("matrix", matrix, persistent=False)

    @classmethod
    def load(cls, path: str | Path = NOUNS_FILE, classes: int = CLASSES) -> ClassNouns:
        """Read a table: a YAML file with a list of nouns for each class, in the order of the classes.

        Raises:
            FileNotFoundError, OSError: the file is not there, or cannot be read.
            BadFileError: it is no such table, or one of another number of classes.
        """
        rows = plain(read_yaml(path))
        if not isinstance(rows, list) or len(rows) != classes:
            found = f"a list of {len(rows)}" if isinstance(rows, list) else type(rows).__name__
            raise BadFileError(f"{path} must hold a list of {classes} lists of nouns, found {found}.")
        for index, row in enumerate(rows):
            if not isinstance(row, list) or not row or not all(isinstance(noun, str) and noun for noun in row):
                raise BadFileError(f"{path}: class {index} must have a list of nouns, found {row!r}.")
        return cls(rows)

    def log_probs_of(self, noun: str, class_log_probs: Tensor) -> Tensor:
        """Logarithms of a noun's probability, the sum over the classes that have it: (..., C) to (...), finite.

        Raises:
            ValueError: no class has the noun.
        """
        if noun not in self.index:
            raise ValueError(f"No class of the table has the noun '{noun}'; {len(self.nouns):,} others are in it.")
        column = self.matrix[:, self.index[noun]]  # (C,)
        with no_autocast(class_log_probs.device):
            return (class_log_probs.float().exp() @ column.float()).clamp_min(LEAST_PROBABILITY).log()
