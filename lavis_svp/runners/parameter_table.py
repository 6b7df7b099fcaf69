"""The table shown before training: what the model consists of, what of it trains, at which rate, in which precision."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lavis_svp.runners.training_log import write_line

WIDTH = 110  # columns of the rendered table


@dataclass
class ParameterRow:
    """One part of the model.

    Args:
        module: its name.
        parameters: how many numbers it has.
        trainable: how many of them train.
        rates: peak learning rates of those, ascending.
        dtypes: precisions its weights are stored in.
    """

    module: str
    parameters: int = 0
    trainable: int = 0
    rates: list[float] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)


def parameter_rows(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[ParameterRow]:
    """Count a model's parameters by part, in the order of the modules.

    Args:
        model: not wrapped; one that offers ``parameter_row(name)`` says which row a parameter belongs to, others get a
            row for each module of the second level. Parameters that ZeRO-3 has split count whole.
        groups: the optimizer's, with ``param_names`` and ``peak_lr``, as ``build_optimizer`` makes them.
    """
    rate_of = {name: float(group["peak_lr"]) for group in groups for name in group["param_names"]}
    row_of: Callable[[str], str] = getattr(model, "parameter_row", _second_level)
    rows: dict[str, ParameterRow] = {}
    named = dict(model.named_parameters())
    for child in getattr(model, "replicated_modules", ()):  # runner_deepspeed may hold them outside of the modules
        named |= {f"{child}.{name}": parameter for name, parameter in getattr(model, child).named_parameters()}
    for name, parameter in named.items():
        row = rows.setdefault(row_of(name), ParameterRow(row_of(name)))
        count = int(getattr(parameter, "ds_numel", parameter.numel()))
        row.parameters += count
        row.dtypes = sorted({*row.dtypes, str(parameter.dtype).removeprefix("torch.")})
        if parameter.requires_grad:
            row.trainable += count
            if name in rate_of:
                row.rates = sorted({*row.rates, rate_of[name]})
    return list(rows.values())


def render(rows: Iterable[ParameterRow]) -> str:
    """The rows and their total as a text table."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title="parameters")
    table.add_column("module", no_wrap=True)
    for heading in ("parameters", "trainable", "lr (peak)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("dtype")
    for row in rows:
        trainable = f"{row.trainable:,}" if row.trainable else "-"
        rates = " … ".join(f"{rate:g}" for rate in (row.rates[:1] + row.rates[-1:] if row.rates[1:] else row.rates))
        table.add_row(row.module, f"{row.parameters:,}", trainable, rates, ", ".join(row.dtypes))
    total, trained = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    table.add_section()
    table.add_row("all", f"{total:,}", f"{trained:,} ({trained / max(1, total):.2%})", "", "")
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return text.getvalue().rstrip()


def report_parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Show the table in the log, and write its rows as one JSON line to log.txt; nothing but in the main process.

    Args:
        model: see :func:`parameter_rows`.
        groups: see :func:`parameter_rows`.
        folder: the run's output folder.
    """
    rows = parameter_rows(model, groups)
    logging.info("What trains:\n%s", render(rows))  # LAVIS's logger speaks in the main process only
    write_line(folder, {"parameters": [asdict(row) for row in rows]})


def _second_level(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:-1][:2]) or name
