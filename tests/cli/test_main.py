"""The command ``lavis-svp``: it finds its sub-commands, explains them, and starts fast."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from lavis_svp.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["help", command])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert shown.startswith(f"usage: lavis-svp {command}") and f"lavis-svp {command}" in shown.partition("example")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_parser(command) -> None:
    assert callable(importlib.import_module(COMMANDS[command][0].partition(":")[0]).build_parser)


@pytest.mark.parametrize("words", [[], ["--help"], ["help"], ["-h"]], ids=str)
def test_the_overview_lists_all_commands(words, capsys) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'lavis', 'transformers', 'omegaconf')"
    code = (
        "import contextlib, io, sys; from lavis_svp.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["train", "evaluate", "stages", "demo"])
def test_the_modules_of_release_0_1_still_run(name) -> None:
    done = subprocess.run([sys.executable, "-m", f"lavis_svp.{name}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: lavis-svp" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        "data shards", "export merge", "export shipped", "zoo list", "zoo fetch", "zoo verify", "zoo import-glamm",
    ],
)  # fmt: skip
def test_nested_commands_have_a_description_and_an_example(words, capsys) -> None:
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert rest.partition("\n")[0].endswith(".") and f"lavis-svp {words}" in rest.partition("example:")[2]


@pytest.mark.parametrize(
    ("module", "words", "dest"),
    [
        ("plan", "--model-type tiny --pictures 3", "images"),
        ("probe", "errors --pictures 3", "images"),
        ("probe", "errors --refused 3", "max_refused"),
        ("export", "shipped here --presence 3", "no_target"),
        ("superpixels", "shards store --out out --pictures-per-shard 3", "images_per_shard"),
        ("data", "shards convert --out out --jsonl x --pictures-per-shard 3", "images_per_shard"),
    ],
)
def test_old_flags_work_with_a_warning(module, words, dest) -> None:
    parser = importlib.import_module(f"lavis_svp.cli.{module}").build_parser()
    with pytest.warns(FutureWarning, match=dest.replace("_", "-")):
        assert float(str(getattr(parser.parse_args(words.split()), dest))) == 3
    assert "--pictures" not in parser.format_help() and "--refused" not in parser.format_help()


def test_training_takes_a_yaml_or_stages(capsys) -> None:
    for words in ([], ["--cfg-path", "a.yaml", "--stages", "b.yaml"]):
        with pytest.raises(SystemExit, match="2"):
            main(["train", *words])
        assert "--cfg-path" in capsys.readouterr().err


def test_a_missing_image_is_named_before_a_model_is_loaded(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["segment", "nofile.jpg", "the cup"])
    shown = capsys.readouterr()
    assert "nofile.jpg" in shown.err and not shown.out
