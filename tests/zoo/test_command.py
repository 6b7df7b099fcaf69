"""The command ``lavis-svp zoo``."""

import pytest

from lavis_svp.cli import zoo as command
from lavis_svp.zoo.entries import list_weights


def test_list_shows_everything(toy, capsys):
    toy.put_archive("pypi")
    assert command.main(["fetch", "toy_pypi"]) == 0
    assert command.main(["list"]) == 0
    table = capsys.readouterr().out
    for entry in list_weights():
        assert entry.name in table and entry.licence in table and entry.what in table
    cached = {line.split()[0]: " yes " in line for line in table.splitlines() if line.startswith("toy")}
    assert cached == {"toy_pypi": True, "toy_npm": False}


def test_fetch_all_and_verify(toy, capsys):
    toy.put_archive("pypi")
    toy.put_archive("npm")
    assert command.main(["verify"]) == 0
    assert "Nothing is cached" in capsys.readouterr().out
    assert command.main(["fetch", "--all"]) == 0
    assert command.main(["verify"]) == 0
    (toy.root / "weights" / "toy_npm" / "model.bin").write_bytes(b"changed")
    capsys.readouterr()
    assert command.main(["verify"]) == 1
    assert "has changed" in capsys.readouterr().out


def test_an_unknown_name_is_an_error(toy, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["fetch", "toy_pypi", "nobody"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Unknown weights 'nobody'" in said and "svp_ris_tiny" in said
    assert not toy.downloads.exists()


@pytest.mark.parametrize("arguments", [["fetch"], ["fetch", "--all", "toy_pypi"], []])
def test_wrong_usage(toy, arguments):
    with pytest.raises(SystemExit):
        command.main(arguments)


def test_interruption_says_how_to_go_on(toy, capsys, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    toy.put_archive("pypi")
    monkeypatch.setattr(toy.converter, "convert", interrupted)
    assert command.main(["fetch", "toy_pypi"]) == 130
    assert "run the same command again" in capsys.readouterr().err
