"""``lavis-svp projectors``: the projectors, their token counts, their sizes and what they cost.

Nothing is measured in time: the numbers follow from the code and are the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_svp.cli.common import command_parser
from lavis_svp.common.paths import write_file

if TYPE_CHECKING:
    from lavis_svp.projectors import PatchFeatures, Projector, Superpixels

GRID = (24, 24)
"""DINOv2 and CLIP at 336 px, patches of 14 px."""
SUPERPIXELS = 40
"""Superpixels of an image, about the paper's mean."""
WIDTHS = {"C=1024, D=4096": (1024, 4096), "C=384, D=576": (384, 576)}
"""Of a 7B language model, and of the embedded tiny one."""
PUBLISHED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("c_abstractor", {"tokens_h": 12, "tokens_w": 12}),
    ("ldp_v2", {"tokens_h": 12, "tokens_w": 12}),
    ("perceiver", {"num_queries": 64}),
    ("pixel_shuffle", {"ratio": 2}),
    ("token_packer", {"scale": 2, "num_levels": 4}),
    ("vision_zip", {"dominant": 54, "contextual": 10}),
)
"""The sources' own settings where they are not the defaults here."""
HEADER = [
    "projector",
    f"tokens at {GRID[0]}x{GRID[1]}",
    *(f"{what}, {at}" for at in WIDTHS for what in ("size", "cost")),
]
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def one_image(projector: Projector) -> tuple[PatchFeatures, Superpixels | None]:
    """Make one image of GRID on the meta device, with everything that the projector requires."""
    import torch

    from lavis_svp.projectors import PatchFeatures, Superpixels

    count = GRID[0] * GRID[1]
    with torch.device("meta"):
        features = PatchFeatures.whole(torch.empty(1, count, projector.vision_dim), GRID)
        if "levels" in projector.requires:
            features.levels = torch.empty(1, getattr(projector.options, "num_levels", 1), *features.patches.shape[1:])
        if "cls_attention" in projector.requires:
            features.cls_attention = torch.empty(1, count)
        if "keys" in projector.requires:
            features.keys = torch.empty_like(features.patches)
        if "superpixels" not in projector.requires:
            return features, None
        masks = None if projector.mask_size is None else torch.empty(1, SUPERPIXELS, *projector.mask_size)
        valid = torch.ones(1, SUPERPIXELS, dtype=torch.bool)
        return features, Superpixels(torch.empty(1, SUPERPIXELS, count), masks, valid)


def flops(projector: Projector) -> int:
    """Count the operations of one image of GRID on the meta device, a multiplication and an addition being two.

    PyTorch's counter sees products: linear layers, convolutions, attention, dense pooling, distances. Norms,
    activations, softmax, sorting and gathering are left out.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        projector(*one_image(projector))
    return int(counter.get_total_flops())


def row(name: str, options: Mapping[str, Any]) -> list[str]:
    """Make a row of the table: name and options, tokens of a GRID, then parameters and operations at each of WIDTHS."""
    import torch

    from lavis_svp.projectors import build_projector
    from lavis_svp.projectors.base import parameter_count

    cells = []
    for vision_dim, llm_dim in WIDTHS.values():
        with torch.device("meta"):  # sizes without memory
            projector = build_projector(name, vision_dim=vision_dim, llm_dim=llm_dim, grid=GRID, **options)
        count = projector.image_tokens(GRID, SUPERPIXELS)
        cells += [f"{parameter_count(projector) / 1e6:.2f} M", f"{flops(projector) / 1e9:.2f} GFLOP"]
    settings = "".join(f" {key}={value}" for key, value in options.items())
    return [name + settings, "varies" if count is None else str(count), *cells]


def rows() -> list[list[str]]:
    """Make one row for each projector with default options, then those with the sources' own settings."""
    from lavis_svp.projectors import list_projectors

    return [row(name, {}) for name in list_projectors()] + [row(name, options) for name, options in PUBLISHED]


def plain(table: Sequence[Sequence[str]]) -> str:
    """Format the table in columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Format the table as Markdown."""
    named = [table[0], *([f"`{line[0]}`", *line[1:]] for line in table[1:])]
    lines = ["| " + " | ".join(line) + " |" for line in named]
    return "\n".join([lines[0], "|" + "---|" * len(HEADER), *lines[1:]])


def document(text: str) -> str:
    """Return a document with the table between its markers renewed.

    Raises:
        ValueError: the document does not have each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"The document must hold '{BEGIN}' and, after it, '{END}', each once.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{markdown([HEADER, *rows()])}\n{END}{rest.split(END)[1]}"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the sub-command."""
    parser = command_parser(
        "projectors",
        "List all projectors with their visual tokens, parameters and operations for one image. Numbers come from the "
        "code, not from a clock. Any name in the first column can be the value of model.projector.name.",
        "lavis-svp projectors --write docs/projectors.md",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"renew the table between {BEGIN} and {END} of this document"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a document; ``argv`` are the words after the command."""
    args = build_parser().parse_args(argv)
    if args.write is not None:
        fresh = document(args.write.read_text(encoding="utf-8"))
        write_file(args.write, fresh)
        return 0
    table = [HEADER, *rows()]
    print(markdown(table) if args.markdown else plain(table))
    return 0
