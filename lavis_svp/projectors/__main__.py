"""`python -m lavis_svp.projectors`: the projectors, their token counts, their sizes and what they cost.

    python -m lavis_svp.projectors                              print
    python -m lavis_svp.projectors --markdown                   print as Markdown
    python -m lavis_svp.projectors --write docs/projectors.md   renew the table of a document

Nothing is measured in time: the numbers follow from the code, the same on every machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lavis_svp.projectors.base import Projector, parameter_count
from lavis_svp.projectors.registry import build_projector, list_projectors
from lavis_svp.projectors.structures import PatchFeatures, Superpixels

GRID = (24, 24)  # DINOv2 and CLIP at 336 px, patches of 14 px
SUPERPIXELS = 40  # of an image, about the paper's mean
WIDTHS = {"C=1024, D=4096": (1024, 4096), "C=384, D=576": (384, 576)}  # 7B language model; the embedded tiny one
PUBLISHED: tuple[tuple[str, Mapping[str, Any]], ...] = (  # where the sources' own settings are not the defaults here
    ("c_abstractor", {"tokens_h": 12, "tokens_w": 12}),
    ("ldp_v2", {"tokens_h": 12, "tokens_w": 12}),
    ("perceiver", {"num_queries": 64}),
    ("pixel_shuffle", {"ratio": 2}),
    ("token_packer", {"scale": 2, "num_levels": 4}),
    ("vision_zip", {"dominant": 54, "contextual": 10}),
)
HEADER = [
    "projector",
    f"tokens at {GRID[0]}x{GRID[1]}",
    *(f"{what}, {at}" for at in WIDTHS for what in ("size", "cost")),
]
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def image(projector: Projector) -> tuple[PatchFeatures, Superpixels | None]:
    """One image of GRID on the meta device, with what the projector asks for."""
    count = GRID[0] * GRID[1]
    with torch.device("meta"):
        features = PatchFeatures.whole(torch.empty(1, count, projector.vision_dim), GRID)
        if "levels" in projector.requires:
            features.levels = torch.empty(1, getattr(projector.options, "num_levels", 1), *features.patches.shape[1:])
        if "cls_attention" in projector.requires:
            features.cls_attention = torch.empty(1, count)
        if "keys" in projector.requires:
            features.keys = torch.empty_like(features.patches)
        if "summary" in projector.requires:
            features.summary = torch.empty(1, projector.vision_dim)
        if "superpixels" not in projector.requires:
            return features, None
        masks = None if projector.mask_size is None else torch.empty(1, SUPERPIXELS, *projector.mask_size)
        valid = torch.ones(1, SUPERPIXELS, dtype=torch.bool)
        return features, Superpixels(torch.empty(1, SUPERPIXELS, count), masks, valid)


def flops(projector: Projector) -> int:
    """Operations of one forward pass of one image of GRID, a multiplication and an addition being two.

    PyTorch's counter sees products: linear layers, convolutions, attention, dense pooling, distances. Norms,
    activations, softmax, sorting and gathering are left out.

    Args:
        projector: on the meta device.
    """
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        projector(*image(projector))
    return int(counter.get_total_flops())


def row(name: str, options: Mapping[str, Any]) -> list[str]:
    """A projector's name and options, tokens of a GRID, then parameters and operations at each of WIDTHS."""
    cells = []
    for vision_dim, llm_dim in WIDTHS.values():
        with torch.device("meta"):  # sizes without memory
            projector = build_projector(name, vision_dim=vision_dim, llm_dim=llm_dim, grid=GRID, **options)
        count = projector.image_tokens(GRID, SUPERPIXELS)
        cells += [f"{parameter_count(projector) / 1e6:.2f} M", f"{flops(projector) / 1e9:.2f} GFLOP"]
    choices = "".join(f" {key}={value}" for key, value in options.items())
    return [name + choices, "varies" if count is None else str(count), *cells]


def rows() -> list[list[str]]:
    """One row a projector with default options, then the sources' own settings."""
    return [row(name, {}) for name in list_projectors()] + [row(name, options) for name, options in PUBLISHED]


def plain(table: Sequence[Sequence[str]]) -> str:
    """The table in columns."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""
    named = [table[0], *([f"`{line[0]}`", *line[1:]] for line in table[1:])]
    lines = ["| " + " | ".join(line) + " |" for line in named]
    return "\n".join([lines[0], "|" + "---|" * len(HEADER), *lines[1:]])


def document(text: str) -> str:
    """A document with the table between its markers made anew.

    Raises:
        ValueError: it does not have each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"The document must hold '{BEGIN}' and, after it, '{END}', each once.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{markdown([HEADER, *rows()])}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into a document."""
    parser = argparse.ArgumentParser(prog="python -m lavis_svp.projectors", description="Projectors, sizes and costs.")
    parser.add_argument("--markdown", action="store_true", help="print as Markdown")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"renew what stands between {BEGIN} and {END}")
    given = parser.parse_args(arguments)
    if given.write is not None:
        fresh = document(given.write.read_text(encoding="utf-8"))
        draft = given.write.with_name(f".{given.write.name}.{os.getpid()}.tmp")
        draft.write_text(fresh, encoding="utf-8")
        os.replace(draft, given.write)
        return
    table = [HEADER, *rows()]
    print(markdown(table) if given.markdown else plain(table))


if __name__ == "__main__":
    main()
