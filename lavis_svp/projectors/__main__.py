"""`python -m lavis_svp.projectors`: a table of the projectors, their token counts and their sizes."""

from __future__ import annotations

import torch

from lavis_svp.projectors.base import parameter_count
from lavis_svp.projectors.registry import build_projector, list_projectors

GRID = (24, 24)  # DINOv2 and CLIP at 336 px, patches of 14 px
WIDTHS = {"C=1024, D=4096": (1024, 4096), "C=384, D=576": (384, 576)}  # 7B language model; the embedded tiny one


def rows() -> list[list[str]]:
    """One row a projector, with default options: name, tokens of a GRID, millions of parameters at each of WIDTHS."""
    table = []
    for name in list_projectors():
        with torch.device("meta"):  # sizes without memory
            built = [build_projector(name, vision_dim=c, llm_dim=d, grid=GRID) for c, d in WIDTHS.values()]
        count = built[0].num_tokens(GRID)
        sizes = [f"{parameter_count(projector) / 1e6:.2f} M" for projector in built]
        table.append([name, "per picture" if count is None else str(count), *sizes])
    return table


def main() -> None:
    """Print the table."""
    header = ["projector", f"tokens at {GRID[0]}x{GRID[1]}", *WIDTHS]
    lines = [header, *rows()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
