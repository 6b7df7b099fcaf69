"""What ``python -m lavis_svp.train`` and ``python -m lavis_svp.evaluate`` share: from a YAML to a runner.

The order is that of LAVIS's own ``train.py``, which is not in its wheel: configuration, processes, seeds, logger, task,
data sets, model, runner.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lavis_svp.common.options import check_keys

ROOTS = ("model", "datasets", "run")
USER_ERRORS = (ValueError, KeyError, FileNotFoundError, ImportError)  # what a wrong YAML or option raises


def build_parser(description: str, need_config: bool = True) -> argparse.ArgumentParser:
    """LAVIS's command line: ``--cfg-path`` and ``--options``.

    Args:
        description: for ``--help``.
        need_config: whether ``--cfg-path`` must be given.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cfg-path", required=need_config, help="the project YAML (roots: model, datasets, run)")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides, such as run.max_iters=100 model.model_type=tiny",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="ignored; some launchers add it")
    return parser


def read_project(cfg_path: str | Path, options: Sequence[str] = ()) -> Any:
    """Read a project YAML and lay the options over it.

    Args:
        cfg_path: relative to the current directory, or absolute.
        options: ``run.x=1 model.y=2``, or, as LAVIS also takes them, ``run.x 1 model.y 2``.

    Returns:
        An OmegaConf mapping with the roots model, datasets, run.

    Raises:
        FileNotFoundError: no such YAML.
        ValueError: options that cannot be read, or a root that is unknown or missing.
    """
    from omegaconf import OmegaConf

    path = Path(cfg_path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration at {path} (current directory: {Path.cwd()}).")
    project: Any = OmegaConf.load(path)
    for option in dot_list(options):
        project = lay_over(project, option)
    check_keys(project, ROOTS, f"the roots of {path}")
    missing = [root for root in ROOTS if project.get(root) is None]
    if missing:
        raise ValueError(f"{path} has no section {', '.join(missing)}. A project YAML has: {', '.join(ROOTS)}.")
    if isinstance(
        project.run.get("deepspeed_config"), str
    ):  # its content, so that a checkpoint's configuration is whole
        from lavis_svp.runners.deepspeed_config import read_config

        project.run.deepspeed_config = read_config(project.run.deepspeed_config, path)
    return project


def lay_over(project: Any, option: str) -> Any:
    """Lay one option over a project: mappings are merged, and a list takes a mapping's place or the other way round.

    Args:
        project: an OmegaConf mapping.
        option: ``key=value``, the key with dots.

    Returns:
        The project with the option's value.

    Raises:
        ValueError: the key goes through a value that has no such keys, as ``run.test_splits.val`` goes through a list.
    """
    from omegaconf import OmegaConf

    key = option.partition("=")[0]
    try:
        change = OmegaConf.from_dotlist([option])
        old = OmegaConf.select(project, key, throw_on_resolution_failure=False)
        new = OmegaConf.select(change, key, throw_on_resolution_failure=False)
        containers = OmegaConf.is_config(old) and OmegaConf.is_config(new)
        if containers and OmegaConf.is_list(old) != OmegaConf.is_list(new):
            OmegaConf.update(project, key, new, merge=False)
            return project
        return OmegaConf.merge(project, change)
    except (TypeError, KeyError) as error:  # OmegaConf's own are of these kinds
        raise ValueError(f"--options {option} does not fit the YAML: {error}") from error


def dot_list(options: Sequence[str]) -> list[str]:
    """Bring ``--options`` into the form key=value.

    Raises:
        ValueError: an item without a value.
    """
    if not options or "=" in options[0]:
        bad = [option for option in options if "=" not in option]
        if bad:
            raise ValueError(f"--options takes key=value; there is no '=' in: {' '.join(bad)}.")
        return list(options)
    if len(options) % 2:
        raise ValueError(f"--options takes key=value, or pairs of key and value; '{options[-1]}' has no value.")
    return [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]


def build_config(project: Any) -> Any:
    """Make LAVIS's Config: the default YAMLs of the model's and the data sets' types under the project's own values.

    Unlike LAVIS's, it lays the options over the project YAML first, so that ``--options model.model_type=...`` and
    ``datasets.<name>.type=...`` choose the defaults, too. It checks the ``run:`` section and fills in its defaults.

    Args:
        project: what :func:`read_project` returns.

    Raises:
        KeyError: an unknown model, model type, data set, data set type, task or runner; lists the known ones.
        ValueError: an unknown key in ``run:``, or an impossible value.
    """
    import lavis  # noqa: F401  (registers everything)
    from lavis.common.config import Config
    from lavis.common.registry import registry
    from omegaconf import OmegaConf

    from lavis_svp.runners.lavis_loop import complete_for_lavis
    from lavis_svp.runners.run_options import resolve_device, with_defaults
    from lavis_svp.runners.runner_svp import RunnerSVP

    if not project.model.get("arch") or not project.model.get("model_type"):
        raise ValueError("The model section needs arch (a registered model) and model_type (one of its types).")
    runner = registry.get_runner_class(project.run.get("runner", "runner_svp"))
    owners = [runner] if project.run.get("task") is None else [runner, registry.get_task_class(project.run.task)]
    run = with_defaults(project.run, owners)
    if not issubclass(runner, RunnerSVP):
        run = complete_for_lavis(run)
    device = resolve_device(run["device"])
    if run["device"] == "auto":
        run["device"] = device.type

    config = Config.__new__(Config)  # its __init__ reads the YAML itself, and applies the options too late
    config.args = argparse.Namespace(cfg_path=None, options=None)
    config.config = OmegaConf.merge(
        {"run": run}, Config.build_model_config(project), Config.build_dataset_config(project)
    )
    registry.register("configuration", config)
    return config


def weights_from_checkpoint(project: Any) -> None:
    """Have the model built without the weights that ``model.pretrained`` and ``model.finetuned`` name.

    For a model about to be given a checkpoint, which holds all of them: an earlier stage's folder need not exist any
    more. Models whose checkpoints do not say so (``CHECKPOINTS_ARE_WHOLE``) are left as they are.

    Args:
        project: what :func:`read_project` returns; changed in place.
    """
    import lavis  # noqa: F401  (registers everything)
    from lavis.common.registry import registry

    model = registry.get_model_class(project.model.arch)
    if getattr(model, "CHECKPOINTS_ARE_WHOLE", False):
        project.model.load_pretrained = project.model.load_finetuned = False


def build_runner(config: Any) -> Any:
    """Join the processes, seed, and build the task, the data sets, the model and the runner that the config names.

    Args:
        config: what :func:`build_config` returns.

    Returns:
        A LAVIS runner; its output folder is ``run.output_dir`` itself, so that the same command finds it again.
    """
    from lavis.common import dist_utils
    from lavis.common.logger import setup_logger
    from lavis.common.registry import registry
    from lavis.tasks import setup_task

    from lavis_svp.runners.randomness import seed_all

    run = config.run_cfg
    dist_utils.init_distributed_mode(run)
    make_repeatable()
    seed_all(run.seed, "build", run.rank)
    setup_logger()  # after the processes have met: only the first one logs
    config.pretty_print()
    task = setup_task(config)
    datasets = task.build_datasets(config)
    seed_all(run.seed, "model")  # the same weights in every process, and whatever the data sets drew
    model = task.build_model(config)
    if hasattr(model, "precompute_features"):
        model.precompute_features(datasets)
    return registry.get_runner_class(run.runner)(cfg=config, job_id="", task=task, model=model, datasets=datasets)


def make_repeatable() -> None:
    """Have cuDNN choose the same algorithms at every start, as LAVIS does."""
    from torch.backends import cudnn

    cudnn.benchmark = False
    cudnn.deterministic = True


def run_command(main: Callable[[], None]) -> None:
    """Run a command; leave the process group at its end, and say what is wrong with the user's input in a line.

    The traceback is shown where the error did not come from reading the configuration: see :func:`configure`.
    """
    from torch import distributed

    try:
        main()
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def configure(make: Callable[[], Any]) -> Any:
    """Return what ``make`` does; end the command with a message, without a traceback, if the input is wrong."""
    try:
        return make()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
