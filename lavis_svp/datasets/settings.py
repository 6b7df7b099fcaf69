"""What may stand in a dataset's YAML section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lavis_svp.common.options import build_options, check_keys
from lavis_svp.datasets.drawing import SamplingOptions
from lavis_svp.datasets.refshapes.config import RefShapesConfig

LAVIS_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImagesOptions:
    """``build_info.images``.

    Args:
        storage: the folder with the images or one above it, absolute or below LAVIS's ``cache_root``; None = found
            below ``root``, see ``TRAIN2014_FOLDERS`` in ``layout.py``. LAVIS's ``load_dataset(vis_path=...)`` sets it.
    """

    storage: str | None = None


@dataclass(frozen=True)
class SplitOptions:
    """``build_info.annotations.<train|val|test>``.

    Args:
        splits: exact names of the data set's own splits, one after another.
    """

    splits: list[str]


@dataclass(frozen=True)
class BuildInfo:
    """``build_info``.

    Args:
        root: the folder that holds ``refcoco/``, ``refcoco+/`` ...; absolute, or below LAVIS's ``cache_root``.
            None = ``images.storage`` if the annotations are there, else ``data`` below ``cache_root``.
        split_by: "unc", "umd", "google" ...; None = the data set's usual one.
        annotations: which splits LAVIS's train, val and test are made of; those left out or null are not built.
        images: where the images are.
        shards: a folder of shards (``python -m lavis_svp.datasets.shards``) to read in place of annotation files and
            images; absolute, or below LAVIS's ``cache_root``. ``root`` and ``images`` are then not used.
        use_stored: take superpixels and frozen features out of the shards, if they hold any; the model refuses those
            that it would not make itself. False = leave them.
    """

    root: str | None = None
    split_by: str | None = None
    annotations: dict[str, Any] = field(default_factory=dict)
    images: ImagesOptions = field(default_factory=ImagesOptions)
    shards: str | None = None
    use_stored: bool = True

    def lavis_splits(self, where: str) -> dict[str, SplitOptions]:
        """The annotations section by LAVIS split name.

        Raises:
            ValueError: another split name, an unknown key, no ``splits``.
        """
        check_keys(self.annotations, LAVIS_SPLITS, f"{where}.annotations")
        chosen = {}
        for name, section in self.annotations.items():
            if section is None:
                continue  # a key of LAVIS's default YAML cannot be deleted, but it can be set to null
            place = f"{where}.annotations.{name}"
            if not isinstance(section, Mapping) or not section.get("splits"):
                raise ValueError(
                    f"{place} must say which splits it is made of, e.g. splits: [{name}]; got {section!r}."
                )
            chosen[name] = build_options(SplitOptions, section, place)
        return chosen


@dataclass(frozen=True)
class RefShapesBuildInfo(BuildInfo):
    """``build_info`` of RefShapes.

    Args:
        sizes: images per split; None = what is there already, else the generator's own. Splits left out are empty.
        seed: of the images and expressions.
        scene: what images and expressions look like; give other scenes a ``root`` of their own.
    """

    sizes: dict[str, int] | None = None
    seed: int = 0
    scene: RefShapesConfig = field(default_factory=RefShapesConfig)


@dataclass(frozen=True)
class DatasetOptions:
    """A whole dataset section, ``datasets.<name>``.

    Args:
        data_type: LAVIS's kind of data; always "images".
        type: which of the builder's YAML files was loaded; LAVIS reads it.
        dataset_card: a file about the data set, for readers.
        vis_processor: ``{train: {...}, eval: {...}}``; ``name`` is by default svp_image_train / svp_image_eval.
        text_processor: likewise, by default svp_referring.
        superpixels: a superpixel processor's section (``name`` is by default svp_superpixel); None = the model makes
            the superpixels.
        drawing: which expressions are used, see :class:`~lavis_svp.datasets.drawing.SamplingOptions`.
        build_info: where the data are.
    """

    data_type: str = "images"
    type: str = "default"
    dataset_card: str | None = None
    vis_processor: dict[str, Any] | None = None
    text_processor: dict[str, Any] | None = None
    superpixels: dict[str, Any] | None = None
    drawing: SamplingOptions = field(default_factory=SamplingOptions)
    build_info: BuildInfo = field(default_factory=BuildInfo)


@dataclass(frozen=True)
class RefShapesOptions(DatasetOptions):
    """A section of ``refshapes_seg``."""

    build_info: RefShapesBuildInfo = field(default_factory=RefShapesBuildInfo)
