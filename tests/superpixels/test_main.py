"""The command that draws superpixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_svp.superpixels.__main__ import main


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.new("L", (60, 40), 100).save(path)
    return path


def test_draws_and_counts(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = picture.with_name("out.png")
    main(["--image", str(picture), "--generator", "grid", "--out", str(out), "--options", "rows=2", "cols=3"])
    assert "6 superpixels cover 100.0%" in capsys.readouterr().out
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (40, 60, 3) and (drawn[20, 5] == (255, 255, 0)).all() and (drawn[5, 5] == 100).all()


@pytest.mark.parametrize("options", [["rows"], ["rows=0"], ["raws=2"]])
def test_bad_options_end_with_a_message(picture: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--image", str(picture), "--generator", "grid", "--out", "x.png", "--options", *options])
    assert "error:" in capsys.readouterr().err
