"""LAVIS's builders of the referring-segmentation data sets, and what may stand in their YAML sections."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import OmegaConf

from lavis_svp.common.options import build_options, check_keys
from lavis_svp.datasets.layout import MissingDataError, annotation_files, doctor_command, find_images
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.referring import ReferringDataset
from lavis_svp.datasets.refshapes.config import RefShapesConfig
from lavis_svp.datasets.refthings.config import RefThingsConfig
from lavis_svp.datasets.sampling import SamplingOptions
from lavis_svp.datasets.shards.read import open_shards
from lavis_svp.datasets.sources import DataSource, ImageFolder, Origin, SuperpixelLookup
from lavis_svp.superpixels.store import check_settings

CONFIGS = Path(__file__).parents[1] / "configs" / "datasets"
DATA_FOLDER = "data"
"""The usual root of all data sets, below LAVIS's cache root."""

LAVIS_SPLITS = ("train", "val", "test")
_LINKS_SHOWN = 5  # of the images that a warning is about

T = TypeVar("T")


@dataclass(frozen=True)
class ImagesOptions:
    """``build_info.images``.

    Args:
        storage: the folder with the images or one above it, absolute or below LAVIS's ``cache_root``; None = searched
            below ``root``, see ``TRAIN2014_FOLDERS`` in ``layout.py``. LAVIS's ``load_dataset(vis_path=...)`` sets it.
    """

    storage: str | None = None


@dataclass(frozen=True)
class SplitOptions:
    """``build_info.annotations.<train|val|test>``: exact names of the data set's own splits, one after another."""

    splits: list[str]

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits must name at least one split.")


@dataclass(frozen=True)
class BuildInfo:
    """``build_info``.

    Args:
        root: the folder that holds ``refcoco/``, ``refcoco+/`` ...; absolute, or below LAVIS's ``cache_root``.
            None = ``images.storage`` if the annotations are there, else ``data`` below ``cache_root``.
        split_by: "unc", "umd", "google" ...; None = the data set's usual one.
        annotations: the splits behind LAVIS's train, val and test; those left out or null are not built.
        images: where the images are.
        shards: a folder of shards (``lavis-svp data shards``) to read in place of annotation files and images;
            absolute, or below LAVIS's ``cache_root``. ``root`` and ``images`` are then not used.
        use_stored: use the superpixels and frozen features in the shards, if they hold any; the model refuses those
            that it would not make itself. False = ignore them.
    """

    root: str | None = None
    split_by: str | None = None
    annotations: dict[str, Any] = field(default_factory=dict)
    images: ImagesOptions = field(default_factory=ImagesOptions)
    shards: str | None = None
    use_stored: bool = True


@dataclass(frozen=True)
class RefShapesBuildInfo(BuildInfo):
    """``build_info`` of RefShapes.

    Args:
        sizes: images per split; None = those of the data set on disk, else the generator's own. Splits left out are
            empty.
        seed: of the images and expressions; another one needs a ``root`` of its own.
        scene: what images and expressions look like; likewise.
        backgrounds: the photos behind the training images: "untested", of which none is tested on, or "released_0_5",
            with which releases 0.1 to 0.5 drew; None = "untested".
    """

    sizes: dict[str, int] | None = None
    seed: int = 0
    scene: RefShapesConfig = field(default_factory=RefShapesConfig)
    backgrounds: str | None = None


@dataclass(frozen=True)
class RefThingsBuildInfo(BuildInfo):
    """``build_info`` of RefThings.

    Args:
        sizes: images per split; None = those of the data set on disk, else the generator's own. Splits left out are
            empty.
        seed: of the images and expressions; another one needs a ``root`` of its own.
        scene: what images and expressions look like; likewise.
    """

    sizes: dict[str, int] | None = None
    seed: int = 0
    scene: RefThingsConfig = field(default_factory=RefThingsConfig)


@dataclass(frozen=True)
class RefPhotosBuildInfo(BuildInfo):
    """``build_info`` of RefPhotos.

    Args:
        debian: use the photographs of Debian packages, which apt-get downloads; false = leave them out, with a warning.
    """

    debian: bool = True


@dataclass(frozen=True)
class TrainPhotosBuildInfo(BuildInfo):
    """``build_info`` of TrainPhotos.

    Args:
        views: parts of each training photograph that are added as photographs of their own, 0 to 9; None = as many as
            those on disk have, else none.
    """

    views: int | None = None


@dataclass(frozen=True)
class SectionOptions:
    """The keys of every section ``datasets.<name>``.

    Args:
        data_type: LAVIS's kind of data; always "images".
        type: which of the builder's YAML files was loaded; LAVIS reads it.
        dataset_card: a file about the data set, for readers.
        vis_processor: ``{train: {...}, eval: {...}}``; ``name`` is by default svp_image_train / svp_image_eval.
        text_processor: likewise, by default svp_referring, or svp_question for questions and captions.
        superpixels: a superpixel processor's section (``name`` is by default svp_superpixel); None = the model makes
            the superpixels.
        sampling: which expressions are used, see :class:`~lavis_svp.datasets.sampling.SamplingOptions`.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = {"drawing": "sampling"}

    data_type: str = "images"
    type: str = "default"
    dataset_card: str | None = None
    vis_processor: dict[str, Any] | None = None
    text_processor: dict[str, Any] | None = None
    superpixels: dict[str, Any] | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True)
class DatasetOptions(SectionOptions):
    """A section of a data set of referring expressions."""

    build_info: BuildInfo = field(default_factory=BuildInfo)


@dataclass(frozen=True)
class RefShapesOptions(SectionOptions):
    """A section of ``refshapes_seg``."""

    build_info: RefShapesBuildInfo = field(default_factory=RefShapesBuildInfo)


@dataclass(frozen=True)
class RefThingsOptions(SectionOptions):
    """A section of ``refthings_seg``."""

    build_info: RefThingsBuildInfo = field(default_factory=RefThingsBuildInfo)


@dataclass(frozen=True)
class RefPhotosOptions(SectionOptions):
    """A section of ``refphotos_seg``."""

    build_info: RefPhotosBuildInfo = field(default_factory=RefPhotosBuildInfo)


@dataclass(frozen=True)
class TrainPhotosOptions(SectionOptions):
    """A section of ``trainphotos_seg``."""

    build_info: TrainPhotosBuildInfo = field(default_factory=TrainPhotosBuildInfo)


def config_files(folder: str) -> dict[str, str]:
    """Type -> absolute path, for every YAML file of one data set; absolute paths keep LAVIS from joining its own."""
    return {path.stem: str(path) for path in sorted((CONFIGS / folder).glob("*.yaml"))}


class SectionBuilder(BaseDatasetBuilder):
    """What the builders of expressions, questions and captions share: the checked section and its processors.

    Args:
        cfg: a section, the path of a YAML file, or None for the default type.

    Raises:
        ValueError: the section has an unknown key, or a value out of range.
    """

    name: ClassVar[str]  # as registered
    options_cls: ClassVar[type[Any]]
    text_processor: ClassVar[str]  # name of the default one

    def __init__(self, cfg: Any = None) -> None:
        super().__init__(cfg)
        self.settings()

    def settings(self) -> Any:
        """The section in its present state, checked; ``load_dataset`` changes it after construction."""
        return build_options(self.options_cls, self.config, f"datasets.{self.name}")

    def sections(self, kind: type[T]) -> dict[str, T]:
        """``build_info.annotations`` by LAVIS split name, as dataclasses ``kind``; splits that are null are left out.

        Raises:
            ValueError: another split name, an unknown key, or a key that is missing.
        """
        where = f"datasets.{self.name}.build_info.annotations"
        annotations: Mapping[str, Any] = self.settings().build_info.annotations
        check_keys(annotations, LAVIS_SPLITS, where)
        sections = {}
        for name, section in annotations.items():
            if section is None:
                continue  # a key of LAVIS's default YAML cannot be deleted, but it can be set to null
            try:
                sections[name] = build_options(kind, section, f"{where}.{name}")
            except (TypeError, ValueError) as error:  # a field without a value, or a wrong one
                raise ValueError(f"{where}.{name} is {section!r}, which is not enough or wrong: {error}") from None
        return sections

    def build_processors(self) -> None:
        """Build the vision and text processors; a section without ``name`` means this plugin's own."""
        settings = self.settings()
        images = {"train": "svp_image_train", "eval": "svp_image_eval"}
        texts = {"train": self.text_processor, "eval": self.text_processor}
        self.vis_processors = _processors(settings.vis_processor, images, f"{self.name}.vis_processor")
        self.text_processors = _processors(settings.text_processor, texts, f"{self.name}.text_processor")

    def build_dataset(
        self, source: DataSource, lavis_split: str, splits: Sequence[str], superpixels: SuperpixelLookup | None
    ) -> Any:
        """Build the data set behind LAVIS's train, val or test from some of the source's splits."""
        train = lavis_split == "train"
        mode = "train" if train else "eval"
        return (self.train_dataset_cls if train else self.eval_dataset_cls)(
            source,
            splits,
            train,
            vis_processor=self.vis_processors[mode],
            text_processor=self.text_processors[mode],
            options=self.settings().sampling,
            superpixel_cache=superpixels,
        )

    def superpixels(self) -> SuperpixelLookup | None:
        """The superpixel processor of the section, if it has one."""
        section = self.settings().superpixels
        return None if section is None else _processor(section, "svp_superpixel")

    def _download_data(self) -> None:
        if getattr(self.settings().build_info, "shards", None) is None:
            self.make_data()

    def make_data(self) -> None:
        """Make the data on first use; files that the user provides are not made, :meth:`build` names missing ones."""


class ReferringBuilder(SectionBuilder):
    """Builds the splits of one data set of referring expressions from its YAML section."""

    train_dataset_cls = ReferringDataset
    eval_dataset_cls = ReferringDataset
    options_cls: ClassVar[type[Any]] = DatasetOptions
    text_processor = "svp_referring"
    dataset: ClassVar[str | None]
    """The data set's name in ``layout.SPECS``; None = any, in shards."""

    def root(self) -> Path:
        """The folder that holds the data set's folder, see :class:`BuildInfo`."""
        info = self.settings().build_info
        if info.root is None and info.images.storage is not None:
            folder = below_cache_root(info.images.storage)
            if not annotation_files(folder, self._spec_name(), info.split_by).missing():
                return folder
        return below_cache_root(info.root or DATA_FOLDER)

    def build(self) -> dict[str, ReferringDataset]:
        """Build every split of the section; the annotations are read once for all of them.

        Raises:
            MissingDataError: annotations or images are not there; the message names the doctor's command.
            UnknownNameError: the annotations have no such split.
        """
        self.build_processors()
        info = self.settings().build_info
        splits = self.sections(SplitOptions)
        superpixels = self.superpixels()
        if info.shards is None:
            source = self._open_files(info, [name for section in splits.values() for name in section.splits])
        else:
            source = self._open_shards(info, below_cache_root(info.shards), superpixels)
            superpixels = source.superpixels or superpixels  # those of the shards are made as the section states
        built = {name: self.build_dataset(source, name, one.splits, superpixels) for name, one in splits.items()}
        warn_of_links(built.values())
        return built

    def _open_files(self, info: BuildInfo, splits: list[str]) -> DataSource:
        name = self._spec_name()
        root = self.root()
        files = annotation_files(root, name, info.split_by)
        command = doctor_command(root, name)
        if files.missing():
            missing = " and ".join(map(str, files.missing()))
            raise MissingDataError(f"{self.name} needs {missing}. What goes where and where to get it: {command}")
        annotations = RefCOCO(files.instances, files.refs)
        storage = None if info.images.storage is None else below_cache_root(info.images.storage)
        try:
            folder = find_images(root, name, annotations.images(splits[0])[0].file_name, storage) if splits else root
        except MissingDataError as error:
            raise MissingDataError(
                f"{error} Set datasets.{self.name}.build_info.images.storage, or put the images there: {command}"
            ) from error
        return DataSource(annotations, ImageFolder(folder), origin=Origin(root, name, info.split_by))

    def _open_shards(self, info: BuildInfo, folder: Path, superpixels: SuperpixelLookup | None) -> DataSource:
        origin = None if self.dataset is None else Origin(self.root(), self.dataset, info.split_by)
        source = open_shards(folder, info.use_stored, origin)
        generator = getattr(superpixels, "generator", None)
        if source.superpixels is not None and generator is not None:
            check_settings(source.superpixels.settings, generator.settings(), folder)
        return source

    def _spec_name(self) -> str:
        if self.dataset is None:
            raise ValueError(
                f"{self.name} reads shards only: set datasets.{self.name}.build_info.shards to a folder that "
                "`lavis-svp data shards convert` wrote."
            )
        return self.dataset


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
        info = self.settings().build_info
        make_refshapes(self.root(), info.sizes, info.seed, info.scene, info.backgrounds)


@registry.register_builder("refthings_seg")
class RefThingsBuilder(ReferringBuilder):
    """RefThings, named things composed on photographs, made on first use. Types: default, train, val, test."""

    name = "refthings_seg"
    dataset = "refthings"
    options_cls = RefThingsOptions
    DATASET_CONFIG_DICT = config_files("refthings")

    def make_data(self) -> None:
        """Compose the images and write the annotations, unless they are there."""
        from lavis_svp.datasets.refthings.build import DEFAULT_SIZES, build_refthings, made_sizes

        info, root = self.settings().build_info, self.root()
        build_refthings(root, info.sizes or made_sizes(root) or DEFAULT_SIZES, info.seed, info.scene)


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


@registry.register_builder("refphotos_seg")
class RefPhotosBuilder(ReferringBuilder):
    """Real photographs with masks and expressions made by hand, for testing only; made on first use. Type: default."""

    name = "refphotos_seg"
    dataset = "refphotos"
    options_cls = RefPhotosOptions
    DATASET_CONFIG_DICT = config_files("refphotos")

    def make_data(self) -> None:
        """Get the photographs and write the annotations, unless they are there."""
        from lavis_svp.datasets.refphotos import build_refphotos

        build_refphotos(self.root(), debian=self.settings().build_info.debian)


@registry.register_builder("trainphotos_seg")
class TrainPhotosBuilder(ReferringBuilder):
    """Real photographs marked by hand like RefPhotos, to train on; made on first use. Types: default, train, val."""

    name = "trainphotos_seg"
    dataset = "trainphotos"
    options_cls = TrainPhotosOptions
    DATASET_CONFIG_DICT = config_files("trainphotos")

    def make_data(self) -> None:
        """Get the photographs and write the annotations, unless they are there."""
        from lavis_svp.datasets.trainphotos import build_trainphotos

        build_trainphotos(self.root(), views=self.settings().build_info.views)


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
    root: Path,
    sizes: Mapping[str, int] | None,
    seed: int,
    scene: RefShapesConfig | None = None,
    backgrounds: str | None = None,
) -> None:
    """Make RefShapes below a data folder, unless it is there; without sizes, in those that it has or the usual ones."""
    from lavis_svp.datasets.refshapes.build import DEFAULT_SIZES, build_refshapes, made_sizes

    sizes = sizes or made_sizes(root) or DEFAULT_SIZES
    build_refshapes(root, sizes, seed, scene, backgrounds=backgrounds or "untested")


def warn_of_links(datasets: Iterable[ReferringDataset]) -> None:
    """Warn once of images that links lead to out of their folder: whoever made the links chose what is read."""
    named: dict[Path, set[str]] = {}
    for dataset in datasets:
        store = dataset.source.images
        if isinstance(store, ImageFolder):
            named.setdefault(store.folder, set()).update(image.file_name for image in dataset.annotation)
    for folder, names in named.items():
        links = ImageFolder(folder).links_out(names)
        if links:
            shown = ", ".join(links[:_LINKS_SHOWN]) + (" ..." if len(links) > _LINKS_SHOWN else "")
            logging.warning("%s: links lead %s images out of this folder: %s", folder, f"{len(links):,}", shown)


def below_cache_root(path: str) -> Path:
    """A path of a YAML: absolute, or below LAVIS's cache root."""
    return Path(registry.get_path("cache_root")) / Path(path).expanduser()  # an absolute path stays unchanged


def _processors(sections: Mapping[str, Any] | None, defaults: Mapping[str, str], where: str) -> dict[str, Any]:
    """The processors of training and of evaluation, from their YAML sections and default names."""
    check_keys(sections or {}, defaults, where)
    return {mode: _processor((sections or {}).get(mode), default) for mode, default in defaults.items()}


def _processor(section: Mapping[str, Any] | None, default: str) -> Any:
    values = {"name": default, **(section or {})}
    return registry.get_processor_class(values["name"]).from_config(OmegaConf.create(values))
