"""LAVIS's registry and zoos: unknown names are errors that list the known ones, late registrations show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lavis_svp.common.paths import cache_root
from lavis_svp.common.registry import unknown_name

STOCK_CACHE_ROOT = "/export/home/.cache/lavis"  # a folder of its authors' machines, in LAVIS's default.yaml


def patch_registry_errors() -> None:
    """Make lookups of unknown names raise an error that lists the known ones; LAVIS answers None.

    LAVIS itself relies on the None in one place, ``load_dataset``, which then prints the known datasets and exits the
    process; it now raises the same error as the others.
    """
    from lavis.common.registry import registry
    from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
    from lavis.models.base_model import BaseModel

    cls = type(registry)
    kinds = {"builder": "dataset", "lr_scheduler": "lr scheduler"}
    for kind in ("model", "builder", "task", "processor", "runner", "lr_scheduler"):
        setattr(cls, f"get_{kind}_class", classmethod(_lookup(kinds.get(kind, kind), f"{kind}_name_mapping")))

    path_of_model, path_of_dataset = BaseModel.default_config_path, BaseDatasetBuilder.default_config_path

    def model_config_path(cls: Any, model_type: str) -> str:
        """Return the default YAML of a model type, or name the types there are."""
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            raise unknown_name(f"type of {cls.__name__}", model_type, cls.PRETRAINED_MODEL_CONFIG_DICT)
        return path_of_model.__func__(cls, model_type)

    def dataset_config_path(cls: Any, type: str = "default") -> str:
        """Return the default YAML of a dataset type, or name the types there are."""
        if type not in cls.DATASET_CONFIG_DICT:
            raise unknown_name(f"type of {cls.__name__}", type, cls.DATASET_CONFIG_DICT)
        return path_of_dataset.__func__(cls, type)

    BaseModel.default_config_path = classmethod(model_config_path)
    BaseDatasetBuilder.default_config_path = classmethod(dataset_config_path)


def _lookup(kind: str, mapping: str) -> Callable[[Any, str], type]:
    def get_class(cls: Any, name: str) -> type:
        known = cls.mapping[mapping]
        if name not in known:
            raise unknown_name(kind, name, known)
        return known[name]

    return get_class


class LiveZoo(Mapping[str, list[str]]):
    """Registered names and their types, read from LAVIS's registry at each look; LAVIS takes a snapshot at import.

    Args:
        mapping: the registry's mapping from name to class.
        attribute: the class attribute whose keys are the types.
    """

    def __init__(self, mapping: Mapping[str, type], attribute: str) -> None:
        self._mapping = mapping
        self._attribute = attribute

    def __getitem__(self, name: str) -> list[str]:
        return list(getattr(self._mapping[name], self._attribute, {}))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._mapping))

    def __len__(self) -> int:
        return len(self._mapping)


def show_registered_names() -> None:
    """Let ``print(model_zoo)`` and ``dataset_zoo`` show what was registered after LAVIS's own import."""
    from lavis.common.registry import registry
    from lavis.datasets.builders import dataset_zoo
    from lavis.models import model_zoo

    model_zoo.model_zoo = LiveZoo(registry.mapping["model_name_mapping"], "PRETRAINED_MODEL_CONFIG_DICT")
    dataset_zoo.dataset_zoo = LiveZoo(registry.mapping["builder_name_mapping"], "DATASET_CONFIG_DICT")


def set_cache_root() -> None:
    """Make LAVIS's cache folder this plugin's, unless the user has set one in LAVIS's ``default.yaml``."""
    from lavis.common.registry import registry

    if registry.mapping["paths"]["cache_root"] == STOCK_CACHE_ROOT:
        registry.mapping["paths"]["cache_root"] = str(cache_root())
