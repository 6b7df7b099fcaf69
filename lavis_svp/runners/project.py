"""From a project YAML to a runner: configuration, processes, seeds, logger, task, data sets, model, runner.

The order is that of LAVIS's own ``train.py``, which is not in its wheel.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lavis.common import dist_utils
from lavis.common.config import Config
from lavis.common.logger import setup_logger
from lavis.common.registry import registry
from lavis.tasks import setup_task
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_svp.common.checkpoints import (
    WrongCheckpointError,
    load_trained_state,
    newest_checkpoint,
    read_checkpoint,
)
from lavis_svp.common.devices import resolve_dtype
from lavis_svp.common.files import BadFileError, check_yaml, one_line, read_yaml
from lavis_svp.common.options import SetupError, build_options, check_keys, plain
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets.builders import SectionBuilder
from lavis_svp.models.config import ModelOptions, parse_model_options
from lavis_svp.runners.data import used_splits, workers_per_process
from lavis_svp.runners.deepspeed_config import read_config
from lavis_svp.runners.distributed import limit_waiting, seed_all, set_numerics
from lavis_svp.runners.options import (
    STORED_MODEL_LEFT_OUT,
    read_options,
    resolve_device,
    stored_project,
    upgrade_project,
    upgraded_config,
    with_defaults,
)
from lavis_svp.runners.resume import lock_folder
from lavis_svp.runners.runner_svp import RunnerSVP
from lavis_svp.vision.feature_cache import check_augmentation, prepare_features
from lavis_svp.vision.feature_extractor import FrozenFeatureExtractor, superpixel_cache
from lavis_svp.zoo import check_name

ROOTS = ("model", "datasets", "run")

SETUP_ERRORS = (
    OSError, ImportError, UnknownNameError, SetupError, BadFileError, WrongCheckpointError,
)  # fmt: skip
"""What :func:`build_runner` raises where data, weights or a package are missing or broken, and not the code."""


class ProjectConfig(Config):
    """LAVIS's Config, made of a project in memory instead of a YAML file and command-line options.

    LAVIS's own constructor reads the file itself and lays the options over the result, too late for
    ``model.model_type`` and ``datasets.<name>.type``, which choose the default YAMLs. ``run`` is complete already.
    """

    def __init__(self, project: Any, run: Mapping[str, Any]) -> None:
        self.args = argparse.Namespace(cfg_path=None, options=None)
        self.config = OmegaConf.merge(
            {"run": run}, self.build_model_config(project), self.build_dataset_config(project)
        )
        registry.register("configuration", self)


@contextmanager
def config_errors(where: str) -> Iterator[None]:
    """Turn what a configuration of the wrong structure drives OmegaConf, LAVIS or us into, to a one-line ValueError.

    Errors that name the fault themselves, and those of missing files and packages, stay as they are.

    Args:
        where: the configuration's name, for the message.
    """
    try:
        yield
    except (UnknownNameError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, OmegaConfBaseException):
            raise
        raise ValueError(f"{where} cannot be used: {one_line(error)}.") from error


def read_project(cfg_path: str | Path, options: Sequence[str] = ()) -> Any:
    """Read a project YAML and lay the options over it; keys of release 0.1 become today's, with a warning.

    Args:
        cfg_path: relative to the current directory, or absolute.
        options: ``run.x=1 model.y=2``, or, as LAVIS also takes them, ``run.x 1 model.y 2``.

    Raises:
        FileNotFoundError: no such YAML.
        ValueError: options that cannot be read, a root that is unknown or missing, or a removed option in use.
    """
    path = Path(cfg_path)
    if not path.exists():
        raise FileNotFoundError(f"There is no configuration at {path} (current directory: {Path.cwd()}).")
    content = read_yaml(path)
    if not OmegaConf.is_dict(content):
        raise ValueError(f"{path} is no project: it must have the roots {', '.join(ROOTS)}.")
    with config_errors(str(path)):
        project: Any = upgrade_project(content)
        for option in dot_list(options):
            project = apply_option(project, option)
        check_sections(project, str(path))
        config = project.run.get("deepspeed_config")
        if isinstance(config, str):  # the file's content makes a checkpoint's config complete
            project.run.deepspeed_config = read_config(config, path)
    return project


def check_sections(project: Any, where: str) -> None:
    """Check that a project has its roots, and that they and the data sets' sections are mappings.

    Raises:
        ValueError: names what is missing, unknown or no mapping; ``where`` is the project's name.
    """
    check_keys(project, ROOTS, f"the roots of {where}")
    missing = [root for root in ROOTS if project.get(root) is None]
    if missing:
        raise ValueError(f"{where} has no section {', '.join(missing)}. A project YAML has: {', '.join(ROOTS)}.")
    sections = {root: project.get(root) for root in ROOTS}
    if OmegaConf.is_dict(sections["datasets"]):
        sections |= {f"datasets.{name}": section for name, section in sections["datasets"].items()}
    for name, section in sections.items():
        if not OmegaConf.is_dict(section):
            raise ValueError(f"In {where}, {name} is {section!r}; it must be a mapping.")


def apply_option(project: Any, option: str) -> Any:
    """Return the project with one ``key=value``: mappings are merged, and a list and a mapping replace each other.

    Raises:
        ValueError: the key goes through a value that has no such keys, as ``run.test_splits.val`` goes through a list.
    """
    key, _, value = option.partition("=")
    try:
        check_yaml(value)
        change = OmegaConf.from_dotlist([option])
        upgraded = upgrade_project(change, OmegaConf.select(project, "model.arch"))
        if upgraded is not change:
            return OmegaConf.merge(project, upgraded)
        old = OmegaConf.select(project, key, throw_on_resolution_failure=False)
        new = OmegaConf.select(change, key, throw_on_resolution_failure=False)
        containers = OmegaConf.is_config(old) and OmegaConf.is_config(new)
        if containers and OmegaConf.is_list(old) != OmegaConf.is_list(new):
            OmegaConf.update(project, key, new, merge=False)
            return project
        return OmegaConf.merge(project, change)
    except Exception as error:  # PyYAML's, OmegaConf's, and what they do not catch
        raise ValueError(f"--options {one_line(option)} does not fit the YAML: {one_line(error)}") from error


def dot_list(options: Sequence[str]) -> list[str]:
    """Bring ``--options`` into the form key=value; an item without a value is a ValueError."""
    if not options or "=" in options[0]:
        bad = [option for option in options if "=" not in option]
        if bad:
            raise ValueError(f"--options takes key=value; there is no '=' in: {' '.join(bad)}.")
        return list(options)
    if len(options) % 2:
        raise ValueError(f"--options takes key=value, or pairs of key and value; '{options[-1]}' has no value.")
    return [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]


def build_config(project: Any) -> ProjectConfig:
    """Make LAVIS's Config: the default YAMLs of the model's and the data sets' types under the values of a project.

    The ``run:`` section is checked and its defaults are filled in. So are all names and options of this package's
    models, data sets and tasks: a typo is an error here, before data and weights are built.

    Raises:
        KeyError: an unknown model, model type, data set, data set type, task or runner, or an unknown part of a model
            or data set; lists the known ones.
        ValueError: an unknown key, an impossible value, a ``${...}`` that leads nowhere, a removed option in use, or a
            runner of LAVIS's for svp_ris.
    """
    with config_errors("The configuration"):
        plain(project)  # everything is resolved sooner or later
        return _build_config(project)


def _build_config(project: Any) -> ProjectConfig:
    check_sections(project, "the configuration")
    names = {"model.arch": project.model.get("arch"), "model.model_type": project.model.get("model_type")}
    names |= {f"datasets.{name}.type": section.get("type") for name, section in project.datasets.items()}
    names |= {f"run.{key}": project.run.get(key) for key in ("task", "runner")}
    for key, value in names.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key} is {plain(value)!r}; it must be a name.")
    if not project.model.get("arch") or not project.model.get("model_type"):
        raise ValueError("The model section needs arch (a registered model) and model_type (one of its types).")
    if not project.datasets:
        raise ValueError("The section datasets names no data set.")
    name = project.run.get("runner", "runner_svp")
    runner = registry.get_runner_class(name)
    owners = [runner] if project.run.get("task") is None else [runner, registry.get_task_class(project.run.task)]
    run = with_defaults(project.run, owners)
    if not issubclass(runner, RunnerSVP):
        if project.model.arch == "svp_ris":
            raise ValueError(
                f"run.runner is '{name}', but svp_ris trains under runner_svp or runner_deepspeed: LAVIS's own runners "
                "neither average micro-batches nor clip gradients nor resume exactly."
            )
        run["max_iters"] = run["max_iters"] or int(run["evaluate"])  # LAVIS's runner_iter refuses 0 in both
        run["iters_per_inner_epoch"] = run["iters_per_inner_epoch"] or run["max_iters"]
    device = resolve_device(run["device"])
    if run["device"] == "auto":
        run["device"] = device.type
    if run["num_workers"] == "auto" and not issubclass(runner, RunnerSVP):
        run["num_workers"] = workers_per_process(device)
    config = ProjectConfig(project, run)
    if project.model.arch == "svp_ris":
        with config_errors("The section model"):
            options = parse_model_options(config.model_cfg)
            for part in ("language", "vision_encoder", "sam", "classifier"):
                name = getattr(options, part).name
                if not isinstance(name, str):
                    raise ValueError(f"model.{part}.name is {name!r}; it must be a name or a path.")
                check_name(name)
    for dataset, section in config.datasets_cfg.items():
        builder = registry.get_builder_class(dataset)
        if issubclass(builder, SectionBuilder):
            with config_errors(f"The section datasets.{dataset}"):
                builder(section).build_processors()
    for owner in owners[1:]:
        if hasattr(owner, "options_cls"):
            build_options(owner.options_cls, run.get("eval"), "run.eval")
    return config


def config_to_evaluate(
    cfg_path: str | None, checkpoint: str | Path | None, options: Sequence[str] = ()
) -> tuple[Path | None, ProjectConfig]:
    """Choose the checkpoint to evaluate and make the configuration.

    Args:
        cfg_path: a project YAML; None takes the configuration that is stored in the checkpoint, as far as
            :func:`~lavis_svp.runners.options.stored_project` does: results then go to the checkpoint's folder.
        checkpoint: a file, or a folder of which the newest is taken; None takes the newest of ``run.output_dir``.
        options: laid over the configuration, as for :func:`read_project`.

    Returns:
        The checkpoint, None if the model is to be as its configuration loads it; and LAVIS's Config.

    Raises:
        FileNotFoundError: no such checkpoint, or none in that folder.
        ValueError: neither a YAML nor a checkpoint.
        BadFileError: a damaged checkpoint, or a configuration in it that cannot be used.
    """
    path = Path(checkpoint) if checkpoint else None
    if path is not None and path.is_dir():
        folder, path = path, newest_checkpoint(path)
        if path is None:
            raise FileNotFoundError(f"There is no checkpoint in {folder}.")
    if cfg_path:
        project = read_project(cfg_path, options)
    elif path is None:
        raise ValueError("Name a project YAML, a checkpoint, or both.")
    else:
        return path, _config_in_checkpoint(path, options)
    project.run.evaluate = True
    if path is None and project.run.get("output_dir"):
        path = newest_checkpoint(Path(str(project.run.output_dir)))
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(f"There is no checkpoint at {path}.")
        weights_from_checkpoint(project)
    return path, build_config(project)


def _config_in_checkpoint(path: Path, options: Sequence[str]) -> ProjectConfig:
    stored = stored_config(path)
    project = stored_project(stored, path)
    project.run.output_dir = str(path.parent)
    for option in dot_list(options):
        project = apply_option(project, option)
    check_sections(project, str(path))
    project.run.evaluate = True
    weights_from_checkpoint(project)
    config = build_config(project)
    left_out = _left_out(upgraded_config(stored), config)
    if left_out:
        logging.warning(
            "The values of %s in %s are not used: a checkpoint does not decide where anything is read or written. Set "
            "what you need by --options, or name the project YAML by --cfg-path.",
            ", ".join(left_out),
            path,
        )
    return config


def stored_config(path: Path) -> Any:
    """The configuration that a checkpoint holds, as it is; use :func:`stored_project` on it.

    Raises:
        FileNotFoundError, CorruptCheckpointError: see :func:`~lavis_svp.common.checkpoints.read_checkpoint`.
        BadFileError: it holds none.
    """
    contents = read_checkpoint(path)
    if "config" not in contents:
        raise BadFileError(f"{path} holds no configuration. Name its project YAML by --cfg-path.")
    return contents["config"]


def _left_out(stored: Mapping[str, Any], config: ProjectConfig) -> list[str]:
    """Keys of a stored configuration that say what is evaluated, and that have another value now."""
    now = config.to_dict()
    pairs = {
        f"model.{key}": (stored["model"].get(key), now["model"].get(key))
        for key in STORED_MODEL_LEFT_OUT
        if now["model"].get(f"load_{key}")
    }
    for name, section in now["datasets"].items():
        infos = [one.get("build_info") for one in (stored["datasets"].get(name, {}), section)]
        before, after = (info if isinstance(info, Mapping) else {} for info in infos)
        pairs |= {f"datasets.{name}.build_info.{key}": (value, after.get(key)) for key, value in before.items()}
    return [name for name, (before, after) in pairs.items() if before is not None and before != after]


def weights_from_checkpoint(project: Any) -> None:
    """Have the model built without the weights that ``model.pretrained`` and ``model.finetuned`` name.

    This is for a model that is about to get a checkpoint, which holds all of them: an earlier stage's folder need not
    exist any more. Models whose class does not declare ``CHECKPOINTS_ARE_WHOLE`` still load the named weights. The
    project is changed in place.
    """
    model = registry.get_model_class(project.model.arch)
    if getattr(model, "CHECKPOINTS_ARE_WHOLE", False):
        project.model.load_pretrained = project.model.load_finetuned = False


def build_runner(config: Any) -> Any:
    """Join the processes, seed, and build the task, the data sets, the model and the LAVIS runner of a configuration.

    The output folder is ``run.output_dir`` itself, so that the same command finds it again. The run keeps other runs
    out of it as long as the runner lives.

    Raises:
        FolderInUseError: another run writes to that folder.
    """
    run = config.run_cfg
    dist_utils.init_distributed_mode(run)
    lock = lock_folder(Path(run.output_dir))  # the preparation may take hours: another run is told now
    device = resolve_device(run.device, run.gpu, run.world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what LAVIS's own tasks call `.cuda()` goes there, too
    set_numerics(device, read_options(run))
    seed_all(run.seed, "build", run.rank)
    setup_logger()  # after the processes have met: only the first one logs
    config.pretty_print()
    task = setup_task(config)
    datasets = task.build_datasets(config)
    if config.model_cfg.arch == "svp_ris":
        check_augmentation(datasets, bool(config.model_cfg.get("cache_features")))
    seed_all(run.seed, "model")  # the same weights in every process, whatever the data sets drew
    model = task.build_model(with_dtypes(config, device))
    used = used_splits(read_options(run))
    used_data = {name: {s: one for s, one in splits.items() if s in used} for name, splits in datasets.items()}
    prepare_data(model, used_data, device)
    limit_waiting()
    runner = registry.get_runner_class(run.runner)(cfg=config, job_id="", task=task, model=model, datasets=datasets)
    runner.lock = lock  # LAVIS's own runners take none
    return runner


def with_dtypes(config: Any, device: torch.device) -> Any:
    """The configuration with each ``dtype: auto`` of the model's parts replaced by what it means on this run's device.

    ``auto`` alone would mean what it does on CUDA wherever there is a card, also in a run on the CPU. The given
    configuration, which goes into checkpoints, keeps ``auto``: a checkpoint is evaluated on another device as well.
    """
    if config.model_cfg.arch != "svp_ris":
        return config
    twin = copy.copy(config)
    twin.config = OmegaConf.merge(config.config, {"model": section_with_dtypes(config.model_cfg, device)})
    return twin


def section_with_dtypes(section: Any, device: torch.device) -> Any:
    """:func:`with_dtypes` for the ``model`` section of a svp_ris alone."""
    auto = str(resolve_dtype("auto", device)).removeprefix("torch.")
    hints = typing.get_type_hints(ModelOptions)
    parts = [name for name, kind in hints.items() if dataclasses.is_dataclass(kind) and hasattr(kind, "dtype")]
    sections = {part: section.get(part) or {} for part in parts}
    resolved = {part: {"dtype": auto} for part, one in sections.items() if one.get("dtype", "auto") == "auto"}
    for part in resolved:
        logging.info("model.%s.dtype: auto is %s on %s.", part, auto, device)
    return OmegaConf.merge(section, resolved)


def prepare_data(model: Any, datasets: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
    """Give the data sets the frozen features and superpixels of their images, if the model has a feature extractor.

    What is computed now, on the run's device, ``model.cache_features`` and ``model.superpixels.cache`` say; see
    :func:`~lavis_svp.vision.feature_cache.prepare_features`.

    Args:
        model: its extractor moves to ``device``; the rest stays where it is, for the runner to place.
        datasets: {name: {split: data set}}, the splits that the run reads; the others keep sending images.
        device: of the run.
    """
    extractor = getattr(model, "extractor", None)
    if isinstance(extractor, FrozenFeatureExtractor):
        extractor.to(device)
        options = model.options
        prepare_features(
            extractor,
            datasets,
            cache_features=options.cache_features,
            superpixel_cache=superpixel_cache(options.superpixels),
        )


def runner_with_weights(config: Any, checkpoint: Path | None) -> Any:
    """Build the runner and put a checkpoint's weights into its model; both are from :func:`config_to_evaluate`."""
    runner = build_runner(config)
    if checkpoint is None:
        model = config.model_cfg
        loaded = [model.get(key) for key in ("pretrained", "finetuned") if model.get(f"load_{key}")]
        if loaded:
            logging.info(
                "No checkpoint was given: the weights that the configuration loads are evaluated: %s", ", ".join(loaded)
            )
        else:
            logging.warning(
                "No checkpoint was given, and the configuration loads none: an untrained model is evaluated."
            )
    else:
        logging.info("Evaluating %s", checkpoint)
        if hasattr(runner, "load_checkpoint"):
            runner.load_checkpoint(checkpoint)
        else:
            load_trained_state(runner._model, read_checkpoint(checkpoint)["model"], checkpoint)
    return runner
