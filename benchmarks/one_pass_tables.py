"""The tables of ``docs/superpixels.md`` on superpixels of one pass, from ``results/one_pass.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from results import interval, load, number, table

from lavis_svp.metrics.bootstrap import ratio_interval

COUNTS = (10, 15, 25, 40, 60, 100)
"""Numbers of regions at which generators are compared."""

DEFAULT, MATCHED = "default", "matched"
STOCK, EXACT, PRESET, TINY = "segment_anything", "exact", "preset svp", "sam of the tiny model"
ONE_PASS, ENCODER = "one_pass, side {}", "encoder, side {}"
HELD_OUT = "held-out photos"
SIDE, TINY_SIDE = 1024, 384
SIDES = (SIDE, 512, TINY_SIDE)
STAGES = {
    **{ONE_PASS.format(side): side for side in SIDES},
    PRESET: SIDE,
    EXACT: SIDE,
    STOCK: SIDE,
    f"{TINY}, side {TINY_SIDE}": TINY_SIDE,
    "felzenszwalb": None,
    "slic": None,
}
"""What is timed, and the side of the encoder before it."""

RIVALS = {side: PRESET if side == SIDE else f"{TINY}, side {TINY_SIDE}" for side in (SIDE, TINY_SIDE)}
"""What the one pass takes the place of, by side."""

Images = dict[str, dict[str, dict[str, Any]]]
"""Image -> method -> ``default``, a count or a matched count -> what was measured."""


def medians(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """What was timed -> the median over the photos."""
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    return {name: statistics.median(rows[name] for rows in found.values() if name in rows) for name in names}


def mean_of(images: Images, method: str, at: str, read: Callable[[dict[str, Any]], Iterable[float]]) -> float | None:
    """The mean over the images, or over the objects of all images, of what ``read`` takes from a row."""
    values = [value for rows in images.values() if method in rows for value in read(rows[method][at])]
    return statistics.fmean(values) if values else None


def _pick(key: str, index: int | None = None) -> Callable[[dict[str, Any]], list[float]]:
    """What reads a field of a row: all of a list, or one of its entries; nothing where the row has no such field."""

    def read(row: dict[str, Any]) -> list[float]:
        if key not in row:
            return []
        return row[key] if index is None else [row[key][index]]

    return read


def difference(images: Images, key: str, method: str, count: int) -> tuple[float, tuple[float, float] | None] | None:
    """How far a method's mean of a list of objects lies above the exact masks' at the counts that these reach.

    Returns:
        the difference, and its 95 % interval over resampled images; None without objects.
    """
    sums = []
    for rows in images.values():
        ours = rows[method][f"{MATCHED} {count}"].get(key, [])
        theirs = rows[EXACT][str(count)].get(key, [])
        sums.append((sum(ours) - sum(theirs), len(ours)))
    gains, objects = np.array(sums, float).T[..., None]  # (P, 1) each
    if not objects.sum():
        return None
    return float(gains.sum() / objects.sum()), ratio_interval(gains, objects)


def recall_at_equal_precision(images: Images, method: str, count: int) -> tuple[float, float, float] | None:
    """The boundary precision and recall of the exact masks at a count, and a method's recall at that precision.

    A method's curve runs through its counts, straight between them; beyond its ends it stays level.

    Returns:
        (precision, recall of the exact masks, recall of the method), each a mean over the images; None without masks.
    """
    theirs = [mean_of(images, EXACT, str(count), _pick("objects", which)) for which in (0, 1)]
    if theirs[0] is None or theirs[1] is None:
        return None
    curve = [[mean_of(images, method, str(one), _pick("objects", which)) for which in (0, 1)] for one in COUNTS]
    precision, recall = np.array(sorted(curve), float).T  # (counts,) each
    return theirs[0], theirs[1], float(np.interp(theirs[0], precision, recall))


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """What the issue asks for, of the sections that are there: one line of JSON."""
    line: dict[str, Any] = {}
    if "times" in content:
        seconds = medians(content["times"]["found"])
        for side, rival in RIVALS.items():
            own = seconds[ONE_PASS.format(side)]
            line[f"seconds_{side}"] = round(own, 4)
            line[f"of_encoder_{side}"] = round(own / seconds[ENCODER.format(side)], 4)
            line[f"of_automatic_{side}"] = round(own / seconds[rival], 4)
    images = content.get("quality", {}).get("found", {}).get(HELD_OUT)
    if images:
        for key in ("single", "union"):
            gains = [difference(images, key, ONE_PASS.format(SIDE), count) for count in COUNTS]
            line[f"{key}_gain"] = [round(gain[0], 3) for gain in gains if gain]
        pairs = [recall_at_equal_precision(images, ONE_PASS.format(SIDE), count) for count in COUNTS]
        line["recall_gain"] = [round(pair[2] - pair[1], 3) for pair in pairs if pair]
        line["photos"] = len(images)
    return line


def one_pass() -> str:
    """Every table, and where the numbers come from."""
    content = load("one_pass")
    parts = [_stages(content)]
    for name, images in content["quality"]["found"].items():
        title = f"**{name[0].upper()}{name[1:]}** ({len(images)} images"
        objects = sum(len(rows[EXACT][DEFAULT].get("single", [])) for rows in images.values())
        parts.append(f"{title}, {objects} objects with masks)")
        parts.append(_own_settings(images))
        if objects:
            parts.append(_equal_counts(images))
    parts += [
        "**Against the exact automatic masks on the held-out photos**",
        _gains(content["quality"]["found"][HELD_OUT]),
    ]
    for section in ("times", "memory", "quality"):
        run = content[section]["run"]
        machine = run["machine"]
        parts.append(
            f"{section.capitalize()}: `{run['command']}`, {run['date'][:10]}, {machine['cpus']} CPUs, "
            f"{machine['threads']} threads, torch {machine['torch']}."
        )
    parts.append(f"Result line: `{json.dumps(summary(content))}`")
    return "\n\n".join(parts)


def _stages(content: dict[str, Any]) -> str:
    """Seconds and memory of each stage."""
    found, peaks = content["times"]["found"], content["memory"]["found"]
    seconds, rows = medians(found), []
    for name, side in STAGES.items():
        own = [photo[name] for photo in found.values() if name in photo]
        encoder = seconds[ENCODER.format(side)] if side else None
        rival = seconds[RIVALS[side]] if side in RIVALS else None
        cells = [f"`{name}`", number(seconds[name]), interval([min(own), max(own)])]
        cells += [number(encoder), number(seconds[name] / encoder) if encoder else "–"]
        cells += [number(rival / seconds[name], 1) if rival else "–", number(peaks.get(name), 0), str(len(own))]
        rows.append(cells)
    heads = ["stage", "seconds", "least–most", "encoder s", "of the encoder's", "as fast as `sam`", "peak MB", "photos"]
    halves = "; ".join(
        f"side {side}: {seconds[f'{ONE_PASS.format(side)}: head'] * 1e3:.0f} and "
        f"{seconds[f'{ONE_PASS.format(side)}: hierarchy'] * 1e3:.0f}"
        for side in SIDES
    )
    return f"{table(heads, rows)}\n\nMilliseconds of the head and of watershed and merging: {halves}."


def _methods(images: Images) -> list[str]:
    return list(dict.fromkeys(name for rows in images.values() for name in rows))


def _own_settings(images: Images) -> str:
    """Each generator with its own settings: how many regions, and how they agree with the exact masks."""
    rows = []
    for method in _methods(images):
        counts = [image[method][DEFAULT]["regions"] for image in images.values()]
        cells = [f"`{method}`", number(statistics.fmean(counts), 1)]
        cells.append(" / ".join(f"{np.percentile(counts, percent):.0f}" for percent in (5, 50, 95)))
        for key, indices in (("agreement", (0, 1)), ("exact", (0, 1, 2)), ("objects", (0, 1, 2))):
            values = [mean_of(images, method, DEFAULT, _pick(key, index)) for index in indices]
            own = method == EXACT and key != "objects"
            cells.append("–" if own else " / ".join(number(value, 2) for value in values))
        rows.append(cells)
    pair = "precision / recall / monosemantic"
    heads = ["own settings", "regions", "5 / 50 / 95 %", "agreement → / ←", f"exact masks: {pair}", f"objects: {pair}"]
    return table(heads, rows)


def _equal_counts(images: Images) -> str:
    """Best single region and best union of an object, at equal counts, and the counts that are reached."""
    rows = []
    for method in _methods(images):
        names = {method: "{}"}
        if method.startswith("one_pass"):
            names[f"{method}, as many as `{EXACT}` reaches"] = f"{MATCHED} {{}}"
        for label, place in names.items():
            cells = [f"`{method}`{label.removeprefix(method)}"]
            for count in COUNTS:
                at = place.format(count)
                both = [mean_of(images, method, at, _pick(key)) for key in ("single", "union")]
                reached = mean_of(images, method, at, lambda row: [row["regions"]])
                cells.append(" / ".join(number(value) for value in both) + f" ({number(reached, 0)})")
            rows.append(cells)
    return table(["best single region / best union (regions)", *map(str, COUNTS)], rows)


def _gains(images: Images) -> str:
    """What the issue asks of the one pass, at the counts that the exact masks reach, with intervals."""
    rows: list[list[str]] = []
    for side in SIDES:
        method = ONE_PASS.format(side)
        for key, what in (("single", "best single region"), ("union", "best union")):
            cells = [_gain(difference(images, key, method, count)) for count in COUNTS]
            rows.append([f"`{method}`: {what}", *cells])
        pairs = [recall_at_equal_precision(images, method, count) for count in COUNTS]
        rows.append([f"`{method}`: boundary recall at equal precision", *map(_recall, pairs)])
    heads: Sequence[str] = ["difference [95 %]; recall (exact masks'), at precision", *map(str, COUNTS)]
    return table(heads, rows)


def _gain(found: tuple[float, tuple[float, float] | None] | None) -> str:
    if found is None:
        return "–"
    value, spread = found
    return f"{value:+.3f}" + (f" [{spread[0]:+.3f}, {spread[1]:+.3f}]" if spread else "")


def _recall(found: tuple[float, float, float] | None) -> str:
    return "–" if found is None else f"{found[2]:.3f} ({found[1]:.3f}) at {found[0]:.3f}"


def head_trials() -> str:
    """What each part of the boundary head brings, from ``head_trials.py``."""
    content = load("head_trials")
    columns = list(next(iter(content["trials"].values())))
    rows = [[name, *(number(row[column]) for column in columns)] for name, row in content["trials"].items()]
    run = content["run"]
    note = (
        f"{content['steps']:,} steps on {content['trained_on']} images, one seed, "
        f"measured on {content['held_out']} others; "
        f"`{run['command']}`, {run['date'][:10]}, {run['machine']['threads']} of {run['machine']['cpus']} CPUs."
    )
    return f"{table(['form of the head', *columns], rows)}\n\n{note}"


def watersheds() -> str:
    """Three watersheds on the same strength, from ``watersheds.py``."""
    content = load("watersheds")
    rows = [
        [name, number(row["ms"], 1), number(row["single"]), number(row["union"])]
        for name, row in content["watersheds"].items()
    ]
    run = content["run"]
    note = (
        f"{content['images']} images held out of training, side {content['side']}; "
        f"`{run['command']}`, {run['date'][:10]}, {run['machine']['threads']} of {run['machine']['cpus']} CPUs."
    )
    return f"{table(['watershed', 'ms an image', 'single', 'union'], rows)}\n\n{note}"


BLOCKS: dict[str, Callable[[], str]] = {"one_pass": one_pass, "head_trials": head_trials, "watersheds": watersheds}
