"""The table of projectors: its counts against hand counts, and the document that holds it."""

from pathlib import Path

import pytest
import torch

from lavis_svp.cli import projectors as module
from lavis_svp.cli.projectors import BEGIN, END, PUBLISHED, document, flops, main
from lavis_svp.projectors import build_projector, list_projectors
from lavis_svp.projectors.base import parameter_count

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "projectors.md"
C, D = 1024, 4096
MLP, ONE_LINEAR = 20.98, (C + 1) * D / 1e6
BY_HAND = [  # millions at C=1024, D=4096, from the sources' layer sizes
    ("mlp", {}, 20.98),
    ("avg_pool", {}, 20.98),
    ("mask_pool", {}, 20.98),
    ("vision_zip", {}, 20.98),
    ("pixel_shuffle", {"ratio": 2}, 33.57),
    ("perceiver", {"num_queries": 64}, 67.22 - ONE_LINEAR + MLP),  # their one Linear, our shared MLP
    ("c_abstractor", {"tokens_h": 12, "tokens_w": 12}, 37.40),
    ("ldp_v2", {"tokens_h": 12, "tokens_w": 12}, 21.02),
    ("token_packer", {"scale": 2, "num_levels": 4}, 36.72),
    ("token_packer", {"scale": 2}, 30.43),
    ("dpc_knn", {}, 4.20 - ONE_LINEAR + MLP),  # the same
]


@pytest.fixture(scope="module")
def counted():
    return module.rows()


@pytest.fixture(autouse=True)
def counted_once(monkeypatch, counted):
    monkeypatch.setattr(module, "rows", lambda: counted)


def on_meta(name, options):
    with torch.device("meta"):
        return build_projector(name, vision_dim=C, llm_dim=D, grid=(24, 24), **options)


@pytest.mark.parametrize(("name", "options", "millions"), BY_HAND, ids=str)
def test_parameters_are_those_counted_by_hand(name, options, millions):
    assert parameter_count(on_meta(name, options)) / 1e6 == pytest.approx(millions, abs=0.02)


@pytest.mark.parametrize(
    ("name", "options", "products"),
    [
        ("mlp", {}, 576 * (C * D + D * D)),
        ("avg_pool", {}, 36 * 576 * C + 36 * (C * D + D * D)),
        ("ldp_v2", {}, 576 * (C * D + D * D) + 36 * 576 * D + 36 * 9 * D),
        ("pixel_shuffle", {}, 36 * (16 * C * D + D * D)),
        ("patch_merger", {}, 144 * (4 * C * 4 * C + 4 * C * D)),
        ("dpc_knn", {}, 4 * 576 * 576 * C + 40 * 576 * C + 40 * (C * D + D * D)),  # off a CPU, in four exact parts
        (
            "perceiver",
            {},
            6 * (40 * C * 512 + 616 * C * 1024 + 2 * 40 * 616 * 512 + 40 * 512 * C + 2 * 40 * C * 4 * C)
            + 40 * (C * D + D * D),
        ),
        (
            "token_packer",
            {},
            36 * 16 * C + 36 * 2 * C * C + 576 * 6 * C * C + 2 * 36 * 16 * C + 36 * C * C + 36 * (C * D + D * D),
        ),
    ],
)
def test_operations_are_those_of_the_products(name, options, products):
    assert flops(on_meta(name, options)) == pytest.approx(2 * products, rel=0.01)


def test_table_lists_every_projector_and_the_sources_settings(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == [*list_projectors(), *(name for name, _ in PUBLISHED)]
    mlp = next(line for line in lines if line.startswith("mlp "))
    assert "576" in mlp and "20.98 M" in mlp  # LLaVA-1.5's, counted by hand
    main(["--markdown"])
    assert capsys.readouterr().out.startswith("| projector | tokens at 24x24 |")


def test_the_documents_table_is_made_from_the_code_and_written_between_its_markers(tmp_path):
    text = DOCUMENT.read_text()
    assert document(text) == text, "run lavis-svp projectors --write docs/projectors.md"
    copy = tmp_path / "copy.md"
    copy.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(["--write", str(copy)])
    written = copy.read_text()
    assert written.startswith(f"before\n{BEGIN}\n| projector") and written.endswith(f"|\n{END}\nafter\n")
    assert [file.name for file in tmp_path.iterdir()] == ["copy.md"]  # no draft left behind
    with pytest.raises(ValueError, match="table:begin"):
        document("no markers")


def test_the_document_describes_every_projector():
    text = DOCUMENT.read_text()
    assert [name for name in list_projectors() if f"**`{name}`**" not in text] == []
