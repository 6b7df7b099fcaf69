"""A plan as tables, for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import rich.table
from rich import box
from rich.console import Console

from lavis_svp.plan.costs import Saving
from lavis_svp.plan.estimate import Plan

TERA, GIGA = 1e12, 1e9
MEMORY_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "buffers": "communication buffers",
    "language": "kept for backward: language model",
    "heads": "kept for backward: projector, prompt head, mask decoder, losses",
    "frozen": "peak of the frozen half (SAM, superpixels)",
    "other": "context, fragmentation",
}


class Table(NamedTuple):
    """A table of text."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(plan: Plan) -> list[Table]:
    """All tables of a plan."""
    return [make(plan) for make in (parameter_table, cost_table, answer_table, memory_table, saving_table)]


def show(plan: Plan, console: Console) -> None:
    """Print a plan to a terminal."""
    for title, heads, rows in tables(plan):
        table = rich.table.Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for index, head in enumerate(heads):
            table.add_column(head, justify="left" if index == 0 or "passes" in head or "paper" in head else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("[bold]Time[/bold]")
    for line in time_lines(plan):
        console.print(f"  {line}", highlight=False)
    console.print("[bold]Assumptions[/bold]")
    for line in assumption_lines(plan):
        console.print(f"- {line}", highlight=False)


def markdown(plan: Plan) -> str:
    """Format a plan as Markdown."""
    parts = []
    for title, heads, rows in tables(plan):
        lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    parts.append("**Time**\n\n" + "\n".join(f"- {line}" for line in time_lines(plan)))
    parts.append("**Assumptions**\n\n" + "\n".join(f"- {line}" for line in assumption_lines(plan)))
    return "\n\n".join(parts)


def parameter_table(plan: Plan) -> Table:
    """Parameters by part."""
    rows: list[tuple[str, ...]] = [
        (name, f"{counts.total:,}", f"{counts.trained:,}") for name, counts in plan.parameters.items()
    ]
    return Table("Parameters", ("part", "parameters", "trained"), rows)


def cost_table(plan: Plan) -> Table:
    """Operations of a training image by part, next to those with ``mlp``."""
    rows = []
    for name, cost in plan.costs.items():
        other = plan.baseline_costs[name]
        cells = (cost.forward, cost.training, other.forward, other.training)
        rows.append((name, *(f"{value / TERA:,.3f}" for value in cells), cost.how))
    sums = [
        sum(getattr(cost, kind) for cost in costs.values())
        for costs in (plan.costs, plan.baseline_costs)
        for kind in ("forward", "training")
    ]
    rows.append(("all", *(f"{value / TERA:,.3f}" for value in sums), ""))
    name = f"{plan.projector} ({plan.tokens} tokens)"
    other_name = f"mlp ({plan.baseline_tokens} tokens)"
    heads = ("part", f"{name} forward", "training", f"{other_name} forward", "training", f"passes of {plan.projector}")
    title = f"TFLOP for a training image with {plan.training.expressions} expressions"
    return Table(title, heads, rows)


def answer_table(plan: Plan) -> Table:
    """Operations of answering by part, next to those with ``mlp``, for one expression of an image and for many."""
    columns = [side[number] for number in (0, 1) for side in (plan.answers, plan.baseline_answers)]
    rows = [(part, *(f"{column[part] / TERA:,.3f}" for column in columns)) for part in columns[0]]
    rows.append(("all", *(f"{sum(column.values()) / TERA:,.3f}" for column in columns)))
    many = f"{plan.assumptions.many} expressions"
    names = (f"{plan.projector}, 1 expression", "mlp, 1 expression", f"{plan.projector}, {many}", f"mlp, {many}")
    return Table("TFLOP of answering with a cache, the image encoded once", ("part", *names), rows)


def memory_table(plan: Plan) -> Table:
    """Memory of one GPU, next to that with ``mlp``."""
    rows: list[tuple[str, ...]] = [
        (label, f"{getattr(plan.memory, key) / GIGA:.2f}", f"{getattr(plan.baseline_memory, key) / GIGA:.2f}")
        for key, label in MEMORY_ROWS.items()
    ]
    peaks = [memory.peak / GIGA for memory in (plan.memory, plan.baseline_memory)]
    fits = ["fits" if peak <= plan.gpu.memory_gb else "does NOT fit" for peak in peaks]
    rows.append(("peak", *(f"{peak:.1f} ({fit})" for peak, fit in zip(peaks, fits, strict=True))))
    where = "DDP" if plan.training.zero is None else f"ZeRO-{plan.training.zero}"
    title = (
        f"GB on one of {plan.num_gpus} {plan.gpu.name}: {where}, {plan.training.dtype}, "
        f"{plan.training.batch_size} images per micro-batch"
    )
    return Table(title, ("part", plan.projector, "mlp"), rows)


def saving_table(plan: Plan) -> Table:
    """The projector's saving over ``mlp`` in both ways of counting, and the paper's claims in their own column."""
    heads = ("quantity (TFLOP unless stated)", "mlp", plan.projector, "saved", "the paper's claim")
    return Table("Saving", heads, [_saving_row(line) for line in plan.savings])


def _saving_row(line: Saving) -> tuple[str, ...]:
    tokens = line.what.startswith("visual tokens")
    values = [f"{v:,.0f}" if tokens else f"{v / TERA:,.2f}" for v in (line.baseline, line.ours)]
    return (line.what, *values, f"{line.saved:.0%}", line.published or "-")


def time_lines(plan: Plan) -> list[str]:
    """Steps, epochs, hours."""
    time, training = plan.duration, plan.training
    lines = [
        f"batch: {training.batch_size} x {training.accumulation} x {plan.num_gpus} GPUs = {time.batch} images per step",
        f"training images: {'unknown' if training.images is None else f'{training.images:,}'} ({training.data})"
        + ("" if time.steps_per_epoch is None else f", {time.steps_per_epoch:,} steps per epoch"),
        f"{time.flops_per_step / 1e15:.2f} PFLOP per step, {time.seconds_per_step:.1f} s per step",
    ]
    if time.steps:
        epochs = "" if time.epochs is None else f" = {time.epochs:.1f} epochs"
        lines.append(f"{time.steps:,} steps{epochs}: {time.hours:.1f} hours = {time.hours / 24:.2f} days")
    else:
        lines.append("run.max_iters is not set, so the time of the whole run is unknown")
    return lines


def assumption_lines(plan: Plan) -> Iterator[str]:
    """All assumptions, each with the option that changes it."""
    assumed, text, gpu = plan.assumptions, plan.text, plan.gpu
    yield "one multiplication and one addition are two operations; norms, activations and resizing are not counted"
    yield f"{assumed.tokens} superpixels per image (--tokens; the paper's mean is about 40, without a published spread)"
    if "boundary_head" in plan.parameters:
        yield (
            "superpixels in one pass: the boundary head's convolutions are counted; watershed and merging run on the "
            "CPU, in threads, and are in no figure (docs/superpixels.md has their seconds)"
        )
    else:
        yield (
            f"{plan.prompts} point prompts per image for the superpixels (--prompts; the second pass is estimated, see "
            "SECOND_PASS_SHARE in lavis_svp/plan/flops.py)"
        )
    yield (
        f"text lengths are numbers of words and marks, not the tokenizer's: {text.prefix} tokens before the image, "
        f"{text.question} per question with an expression of {assumed.expression_words} words (--expression-words), "
        f"{text.answer} per answer"
    )
    yield "data sets have their published sizes; image-disjoint splits and subsets are smaller (--images)"
    yield f"{plan.training.expressions} expressions per training image, layout '{plan.layout}'"
    yield (
        f"{gpu.name}: {gpu.tflops:g} TFLOPS in bf16, {gpu.memory_gb:g} GB ({gpu.source}); "
        f"{assumed.utilisation:.0%} of the peak over a whole step (--utilisation), including waiting"
    )
    yield (
        "training: frozen parts run forward only; a frozen language model still passes gradients of activations to the "
        "projector; checkpointing " + ("runs its layers forward twice" if plan.checkpointing else "is off")
    )
    yield (
        "memory: states by arXiv 1910.02054; kept tensors counted on the real modules, with fused attention; frozen "
        "half by formula, image by image; context 1.5 GB and 5 % fragmentation guessed; see lavis_svp/plan/memory.py"
    )
    yield (
        "as published: every generated token runs vision encoder, projector and the whole sequence again, one call per "
        "expression (GLaMM's generate, use_cache=False); fair: as lavis_svp generates, with one encoding and a cache"
    )
    yield "nothing here was measured on a GPU"
