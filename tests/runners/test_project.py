"""From a YAML and options to a configuration; errors name the fault."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lavis_svp.cli import evaluate, train
from lavis_svp.runners import project as projects


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
    assert config.run_cfg.num_workers == 0 and config.run_cfg.resume == "auto"
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
