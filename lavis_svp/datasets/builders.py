"""LAVIS's builders of the referring-segmentation data sets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import OmegaConf

from lavis_svp.common.options import build_options, check_keys
from lavis_svp.datasets.caches import SuperpixelCache
from lavis_svp.datasets.layout import MissingDataError, Origin, annotation_files, doctor_command, find_images
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.refshapes.config import RefShapesConfig
from lavis_svp.datasets.settings import BuildInfo, DatasetOptions, RefShapesOptions
from lavis_svp.datasets.shards.opening import OpenedShards, check_origin, open_shards
from lavis_svp.datasets.source import AnnotationSource, ImageFolder, ImageStore
from lavis_svp.superpixels.cache import check_settings

CONFIGS = Path(__file__).parents[1] / "configs" / "datasets"
DATA_FOLDER = "data"
"""Below LAVIS's cache root: the usual root of all data sets."""


def config_files(folder: str) -> dict[str, str]:
    """Type -> absolute path, for every YAML file of one data set; absolute paths keep LAVIS from joining its own."""
    return {path.stem: str(path) for path in sorted((CONFIGS / folder).glob("*.yaml"))}


class ReferringBuilder(BaseDatasetBuilder):
    """Builds the splits of one data set from its YAML section.

    Args:
        cfg: a section, the path of a YAML file, or None for the default type.

    Raises:
        ValueError: the section has an unknown key, or a value out of range.
    """

    train_dataset_cls = ReferringDataset
    eval_dataset_cls = ReferringDataset
    options_cls: ClassVar[type[DatasetOptions]] = DatasetOptions
    name: ClassVar[str]
    """The builder's registered name."""
    dataset: ClassVar[str | None]
    """The data set's name in ``layout.SPECS``; None = any."""

    def __init__(self, cfg: Any = None) -> None:
        super().__init__(cfg)
        self.settings()

    def settings(self) -> DatasetOptions:
        """The section as it is now, checked; ``load_dataset`` changes it after construction."""
        return build_options(self.options_cls, self.config, f"datasets.{self.name}")

    def root(self) -> Path:
        """The folder that holds the data set's folder, see :class:`~lavis_svp.datasets.settings.BuildInfo`."""
        info = self.settings().build_info
        if info.root is not None:
            return below_cache_root(info.root)
        images = info.images.storage
        if images is not None:
            folder = below_cache_root(images)
            if not annotation_files(folder, self._spec_name(), info.split_by).missing():
                return folder
        return below_cache_root(DATA_FOLDER)

    def build_processors(self) -> None:
        """Build the vision and text processors; a section without ``name`` means this plugin's own."""
        settings = self.settings()
        self.vis_processors = processors(
            settings.vis_processor, {"train": "svp_image_train", "eval": "svp_image_eval"}, f"{self.name}.vis_processor"
        )
        self.text_processors = processors(
            settings.text_processor, dict.fromkeys(("train", "eval"), "svp_referring"), f"{self.name}.text_processor"
        )

    def build(self) -> dict[str, ReferringDataset]:
        """Build every split of the section; the annotations are read once for all of them.

        Raises:
            MissingDataError: annotations or images are not there; the message names the doctor's command.
            UnknownNameError: the annotations have no such split.
        """
        self.build_processors()
        settings = self.settings()
        info = settings.build_info
        superpixels = self._superpixels(settings)
        opened = self._open_shards(info, superpixels)
        if opened is not None and opened.superpixels is not None:
            superpixels = opened.superpixels  # what the section asks for, made already
        source: AnnotationSource = self._read(info.split_by) if opened is None else opened.source
        images: ImageStore | None = None if opened is None else opened.source
        datasets = {}
        for lavis_split, section in info.lavis_splits(f"datasets.{self.name}.build_info").items():
            if images is None:
                images = ImageFolder(self._images(source, section.splits[0], info.images.storage))
            train = lavis_split == "train"
            mode = "train" if train else "eval"
            datasets[lavis_split] = (self.train_dataset_cls if train else self.eval_dataset_cls)(
                self.vis_processors[mode],
                self.text_processors[mode],
                images.folder,
                splits=section.splits,
                train=train,
                options=settings.drawing,
                superpixel_cache=superpixels,
                source=source,
                images=images,
                stored_superpixels=None if opened is None else opened.superpixels,
                stored_features=None if opened is None else opened.features,
            )
            if self.dataset is not None:
                datasets[lavis_split].origin = Origin(self.root(), self.dataset, info.split_by)
        return datasets

    def _download_data(self) -> None:
        if self.settings().build_info.shards is None:
            self.make_data()

    def make_data(self) -> None:
        """RefCOCO's files are fetched by hand: :meth:`build` says what is missing."""

    def _open_shards(self, info: BuildInfo, superpixels: SuperpixelCache | None) -> OpenedShards | None:
        if info.shards is None:
            return None
        opened = open_shards(below_cache_root(info.shards), info.use_stored)
        check_origin(opened.source, self.dataset, info.split_by, f"datasets.{self.name}")
        generator = getattr(superpixels, "generator", None)
        if opened.superpixels is not None and generator is not None:
            check_settings(opened.superpixels.settings, generator.settings(), opened.source.folder)
        return opened

    def _read(self, split_by: str | None) -> RefCOCO:
        files = annotation_files(self.root(), self._spec_name(), split_by)
        if files.missing():
            raise MissingDataError(
                f"{self.name} needs {' and '.join(map(str, files.missing()))}. What goes where and where to get it: "
                f"{doctor_command(self.root(), self._spec_name())}"
            )
        return RefCOCO(files.instances, files.refs)

    def _images(self, source: AnnotationSource, split: str, storage: str | None) -> Path:
        first = source.images(split)[0]
        given = None if storage is None else below_cache_root(storage)
        try:
            return find_images(self.root(), self._spec_name(), first.file_name, given)
        except MissingDataError as error:
            command = doctor_command(self.root(), self._spec_name())
            raise MissingDataError(
                f"{error}\nSet datasets.{self.name}.build_info.images.storage, or put the images there: {command}"
            ) from error

    def _spec_name(self) -> str:
        if self.dataset is None:
            raise ValueError(
                f"{self.name} reads shards only: set datasets.{self.name}.build_info.shards to a folder that "
                "`python -m lavis_svp.datasets.shards convert` wrote."
            )
        return self.dataset

    def _superpixels(self, settings: DatasetOptions) -> SuperpixelCache | None:
        if settings.superpixels is None:
            return None
        return processor(settings.superpixels, "svp_superpixel")


@registry.register_builder("refcoco_seg")
class RefCOCOBuilder(ReferringBuilder):
    """RefCOCO. Types: default, train, val, testA, testB, test (both), google."""

    name = "refcoco_seg"
    dataset = "refcoco"
    DATASET_CONFIG_DICT = config_files("refcoco")


@registry.register_builder("refcoco_plus_seg")
class RefCOCOPlusBuilder(ReferringBuilder):
    """RefCOCO+, whose expressions avoid words of place. Types: default, train, val, testA, testB, test (both)."""

    name = "refcoco_plus_seg"
    dataset = "refcoco+"
    DATASET_CONFIG_DICT = config_files("refcoco_plus")


@registry.register_builder("refcocog_seg")
class RefCOCOgBuilder(ReferringBuilder):
    """RefCOCOg. Types: default, train, val, test (all partition umd); google, google_train, google_val."""

    name = "refcocog_seg"
    dataset = "refcocog"
    DATASET_CONFIG_DICT = config_files("refcocog")


@registry.register_builder("grefcoco_seg")
class GRefCOCOBuilder(ReferringBuilder):
    """gRefCOCO: no target, one, or several. Types: default, train, val, testA, testB, test (both)."""

    name = "grefcoco_seg"
    dataset = "grefcoco"
    DATASET_CONFIG_DICT = config_files("grefcoco")


@registry.register_builder("refshapes_seg")
class RefShapesBuilder(ReferringBuilder):
    """RefShapes, the built-in data set, made on first use. Types: default, train, val, test."""

    name = "refshapes_seg"
    dataset = "refshapes"
    options_cls = RefShapesOptions
    DATASET_CONFIG_DICT = config_files("refshapes")

    def make_data(self) -> None:
        """Render the images and write the annotations, unless they are there."""
        info = cast(RefShapesOptions, self.settings()).build_info
        make_refshapes(self.root(), info.sizes, info.seed, info.scene)


@registry.register_builder("photos_seg")
class PhotosBuilder(ReferringBuilder):
    """A handful of real photos with expressions written by hand, for testing only; made on first use. Type: default."""

    name = "photos_seg"
    dataset = "photos"
    DATASET_CONFIG_DICT = config_files("photos")

    def make_data(self) -> None:
        """Get the photos and write the annotations, unless they are there."""
        from lavis_svp.datasets.photos import build_photos

        build_photos(self.root())


@registry.register_builder("referring_shards_seg")
class ShardsBuilder(ReferringBuilder):
    """Shards made from COCO-format instances, from JSONL, or from anything else. Type: default."""

    name = "referring_shards_seg"
    dataset = None
    DATASET_CONFIG_DICT = config_files("referring_shards")

    def settings(self) -> DatasetOptions:
        """The section, checked; the place that LAVIS's ``load_dataset(vis_path=...)`` gives is the shards'."""
        settings = super().settings()
        info = settings.build_info
        shards = info.shards or info.images.storage
        return dataclasses.replace(settings, build_info=dataclasses.replace(info, shards=shards))


def make_refshapes(
    root: Path, sizes: Mapping[str, int] | None, seed: int, scene: RefShapesConfig | None = None
) -> None:
    """Make RefShapes below a data folder, unless it is there; without sizes, in those that it has or the usual ones."""
    from lavis_svp.datasets.refshapes import build_refshapes
    from lavis_svp.datasets.refshapes.build import DEFAULT_SIZES, manifest_path

    build_refshapes(root, sizes or _sizes_made(manifest_path(root)) or DEFAULT_SIZES, seed, scene)


def _sizes_made(manifest: Path) -> dict[str, int] | None:
    """The sizes with which RefShapes was made here before, so that asking for no size in particular keeps it."""
    try:
        return json.loads(manifest.read_text())["sizes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not made yet, or damaged: then it is made anew


def below_cache_root(path: str) -> Path:
    """A path of a YAML: absolute, or below LAVIS's cache root."""
    return Path(registry.get_path("cache_root")) / Path(path).expanduser()  # an absolute path stays as it is


def processors(sections: Mapping[str, Any] | None, defaults: Mapping[str, str], where: str) -> dict[str, Any]:
    """The processors of training and of evaluation, from their YAML sections and default names.

    Raises:
        ValueError: an unknown key.
    """
    given = sections or {}
    check_keys(given, defaults, where)
    return {mode: processor(given.get(mode), default) for mode, default in defaults.items()}


def processor(section: Mapping[str, Any] | None, default: str) -> Any:
    """A registered processor from its YAML section and default name."""
    given = {"name": default, **(section or {})}
    return registry.get_processor_class(given["name"]).from_config(OmegaConf.create(given))
