"""Patches of LAVIS 1.0.2, which was not written for plugins, for a CPU, or for today's transformers (4.57).

Two of them come before LAVIS's import: :func:`load_opencv_before_decord` and :func:`restore_moved_names`.
:func:`patch_lavis` applies the others after it. Each function says what LAVIS does without it.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lavis_svp.common.paths import cache_root
from lavis_svp.common.registry import unknown_name

INSTALL_TRANSFORMERS = "pip install transformers==4.57.6"
PREPARATION_TIMEOUT = datetime.timedelta(days=7)
"""For processes that wait while others download data and compute features; the runner then shortens it."""
STOCK_CACHE_ROOT = "/export/home/.cache/lavis"  # a folder of its authors' machines, in LAVIS's default.yaml


def patch_lavis() -> None:
    """Apply every patch of this module to LAVIS, which has just been imported."""
    restore_generate()
    patch_registry_errors()
    show_registered_names()
    set_cache_root()
    run_without_cuda()
    patch_init_distributed()
    patch_output_dir()


def load_opencv_before_decord() -> None:
    """Import OpenCV before LAVIS imports decord, so that OpenCV keeps its own zlib.

    decord loads its library with ``RTLD_GLOBAL``, the zlib in it included. An OpenCV loaded later is bound to that
    zlib, and its ``imread`` gives None for PNG files ("libpng error: bad parameters to zlib").
    """
    import cv2  # noqa: F401


def restore_moved_names() -> None:
    """Put back the three functions that transformers 4.56 moved and that LAVIS imports.

    Raises:
        ImportError: transformers 5 or newer, which dropped what LAVIS's models need, or none at all.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"LAVIS needs transformers, which is not installed: {INSTALL_TRANSFORMERS}") from None
    if int(version.split(".")[0]) >= 5:
        raise ImportError(
            f"transformers {version} is installed, but LAVIS's models break with version 5 and newer. "
            f"lavis-svp is tested with 4.57.6: {INSTALL_TRANSFORMERS}"
        )
    from transformers import modeling_utils, pytorch_utils

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name))


def restore_generate() -> None:
    """Give LAVIS's text models ``generate`` back: since transformers 4.52 a PreTrainedModel has none."""
    from lavis.models import med
    from lavis.models.blip2_models import Qformer, modeling_opt, modeling_t5
    from transformers.generation import GenerationMixin

    models = (med.BertLMHeadModel, Qformer.BertLMHeadModel)
    for cls in (*models, modeling_opt.OPTForCausalLM, modeling_t5.T5ForConditionalGeneration):
        if not issubclass(cls, GenerationMixin):
            cls.__bases__ = (*cls.__bases__, GenerationMixin)


def patch_output_dir() -> None:
    """Resolve ``run.output_dir`` against the current directory, and let a second runner follow a first one."""
    from lavis.common.registry import registry
    from lavis.runners.runner_base import RunnerBase

    def setup_output_dir(self: Any) -> None:  # an empty job_id means no sub-folder of its own
        self.output_dir = Path.cwd() / self.config.run_cfg.output_dir / self.job_id
        self.result_dir = self.output_dir / "result"
        self.result_dir.mkdir(parents=True, exist_ok=True)
        for name in ("result_dir", "output_dir"):
            registry.mapping["paths"][name] = str(getattr(self, name))

    RunnerBase.setup_output_dir = setup_output_dir


def run_without_cuda() -> None:
    """Let LAVIS's runners, loaders and meters work where there is no CUDA and no process group."""
    import torch
    from lavis.common import logger
    from lavis.datasets import data_utils
    from lavis.datasets.datasets.dataloader_utils import PrefetchLoader
    from lavis.runners import runner_base, runner_iter
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    class GuardedDistributed:
        """torch.distributed, whose barrier does nothing where no process group was made."""

        def __getattr__(self, name: str) -> Any:
            return getattr(distributed, name)

        def barrier(self, *args: Any, **kwargs: Any) -> None:
            if distributed.is_available() and distributed.is_initialized():
                distributed.barrier(*args, **kwargs)

    runner_base.dist = runner_iter.dist = GuardedDistributed()

    def synchronize(self: Any) -> None:
        """Add a meter up over the processes, on the device that their backend talks through."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        totals = torch.tensor([self.count, self.total], dtype=torch.float64, device=device)
        distributed.all_reduce(totals)
        self.count, self.total = int(totals[0].item()), totals[1].item()

    logger.SmoothedValue.synchronize_between_processes = synchronize

    def model(self: Any) -> torch.nn.Module:
        if self._wrapped_model is None:
            self._model = self._model.to(self.device)
            devices = [self.config.run_cfg.gpu] if self.cuda_enabled else None
            unused = bool(self.config.run_cfg.get("find_unused_parameters", False))  # LAVIS has no such key
            self._wrapped_model = (
                DistributedDataParallel(self._model, device_ids=devices, find_unused_parameters=unused)
                if self.use_distributed
                else self._model
            )
        return self._wrapped_model

    runner_base.RunnerBase.model = property(model)

    if not torch.cuda.is_available():
        data_utils.move_to_cuda = lambda sample: sample
        PrefetchLoader.__init__ = lambda self, loader: setattr(self, "loader", loader)
        PrefetchLoader.__iter__ = lambda self: iter(self.loader)


def patch_init_distributed() -> None:
    """Make ``init_distributed_mode`` use gloo on a CPU; LAVIS knows nccl only."""
    from lavis.common import dist_utils

    dist_utils.init_distributed_mode = functools.partial(
        init_distributed_mode, silence=dist_utils.setup_for_distributed
    )


def init_distributed_mode(args: Any, silence: Callable[[bool], None]) -> None:
    """Join the process group that ``torch.distributed.run`` or SLURM announces.

    Processes wait for each other as long as a preparation may take; see ``runners/distributed.py`` for what follows.

    Args:
        args: the ``run:`` section; ``distributed``, ``rank``, ``world_size``, ``gpu`` and ``dist_backend`` are set.
        silence: called with "is rank 0"; LAVIS's function that mutes ``print`` elsewhere.
    """
    import torch
    from torch import distributed

    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment and "MASTER_ADDR" in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        args.distributed, args.rank, args.world_size, args.gpu = False, 0, 1, 0
        return
    args.rank, args.world_size, args.gpu = (int(environment[name]) for name in names)
    args.distributed = True
    uses_cuda = torch.device(args.device).type == "cuda"
    args.dist_backend = "nccl" if uses_cuda else "gloo"
    if uses_cuda:
        torch.cuda.set_device(args.gpu)
    distributed.init_process_group(
        args.dist_backend,
        init_method=args.get("dist_url", "env://"),
        world_size=args.world_size,
        rank=args.rank,
        timeout=PREPARATION_TIMEOUT,
    )
    distributed.barrier()
    silence(args.rank == 0)


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
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            raise unknown_name(f"type of {cls.__name__}", model_type, cls.PRETRAINED_MODEL_CONFIG_DICT)
        return path_of_model.__func__(cls, model_type)

    def dataset_config_path(cls: Any, type: str = "default") -> str:
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

    The types are the keys of a class attribute.
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
