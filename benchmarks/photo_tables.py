"""The tables of the model for photographs: its scores, what stands beside them, and short trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from results import interval, load, number, spread, table

FIGURES = {
    "chance": "chance",
    "classifier alone, pick": "pick",
    "classifier alone, IoU": "iou",
    "one region": "single",
    "union of regions": "union",
    "SAM at the centre": "sam_at_centre",
    "noun known": "known",
}
SHIPPED = {  # what the weights for photographs are scored on, and the YAML of projects/svp/eval/ that does it
    "refphotos": "refphotos_tiny_photos",
    "photos": "photos_tiny_photos",
    "refthings": "refthings_tiny_photos",
    "refshapes": "refshapes_tiny_photos",
    "refshapes_fresh": "refshapes_fresh_tiny_photos",
}
IN_README = ("refphotos", "photos", "refshapes_fresh")
SHORT = IN_README[0]  # the row above what stands beside it
BESIDE = ("refphotos", "photos", "refthings", "refshapes")  # measured: results/zero_shot_DATA.json
SIDE_SCORES = {"giou": "gIoU", "giou_seg_given": "gIoU, [SEG] given", "pick_inside": "pick"}
GROUPS = ("all", "clutter few", "clutter scene", "what thing", "what part", "what stuff")
GROUP_PREFIXES = ("kind ", "size ", "group ")


def beside() -> str:
    """Chance, the classifier alone, and the ceilings on RefPhotos."""
    content = load("zero_shot_refphotos")
    groups = content["groups"]
    shown = [*GROUPS, *(name for prefix in GROUP_PREFIXES for name in groups if name.startswith(prefix))]
    rows = [
        [name, str(groups[name]["count"]), *(number(groups[name][key]) for key in FIGURES.values())] for name in shown
    ]
    run = content["run"]
    return "\n\n".join(
        [
            table(["expressions", "number", *FIGURES], rows),
            f"`{run['command']}`, {run['date'][:10]}, {run['machine']['cpus']} CPUs.",
        ]
    )


def shipped() -> str:
    """The scores of the shipped weights for photographs on all their data, and what stands beside them."""
    heads = ["data", "gIoU", "95 % interval", "gIoU of all", "pick of answered", "pick of all", "absent refused"]
    heads += [
        "present refused",
        "chance",
        "classifier alone, pick",
        "classifier alone, IoU",
        "one region",
        "SAM at the centre",
    ]
    rows, notes = [], []
    for data, yaml in SHIPPED.items():
        content = load(f"photographs_{data}")
        head, both, run = content["headline"], content["with_target"], content["run"]
        cells = [data, f"**{number(head['giou_macro'])}**", interval(head["giou_macro_ci"]), number(both["giou"])]
        absent = (content["no_target"] or {}).get("n_acc")
        cells += map(number, (both["pick_inside"], pick_of_all(both), absent, both["seg_miss_rate"]))
        if data in BESIDE:
            beside = load(f"zero_shot_{data}")["groups"]["all"]
            cells += [number(beside[key]) for key in ("chance", "pick", "iou", "single", "sam_at_centre")]
        else:
            cells += ["", "", "", number(both["ceiling_single"])]
        rows.append(cells)
        notes.append(
            f"- {data}: `lavis-svp evaluate --cfg-path projects/svp/eval/{yaml}.yaml` ({run['date'][:10]}, "
            f"{run['machine']['cpus']} CPUs; {content['overall']['n']} expressions on {content['overall']['n_images']} "
            f"images; seed {run['seed']}; file sha256 `{run['shipped_weights']['sha256'][:12]}`)"
        )
    return "\n".join([table(heads, rows), "", *notes])


def pick_of_all(scores: Mapping[str, Any]) -> float:
    """The share of the expressions with a target whose pointer's region lies in it; a refused one has none."""
    return scores["pick_inside"] * scores["n_picks"] / scores["n_target"] if scores["n_picks"] else 0.0


def short() -> str:
    """The README's table."""
    rows = []
    for data in IN_README:
        content = load(f"photographs_{data}")
        head, both = content["headline"], content["with_target"]
        cells = [data, f"**{number(head['giou_macro'])}**", interval(head["giou_macro_ci"])]
        cells += [number(pick_of_all(both)), number((content["no_target"] or {}).get("n_acc"))]
        cells += [number(both["seg_miss_rate"]), number(content["overall"]["tokens_per_image"], 1)]
        rows.append(cells)
        if data == SHORT:
            beside = load(f"zero_shot_{data}")["groups"]["all"]
            rows.append(["*the image classifier alone*", number(beside["iou"]), "", number(beside["pick"])])
            rows.append(["*a region at random*", "", "", number(beside["chance"])])
            rows.append(["*best single superpixel*", number(beside["single"])])
    heads = ["data", "gIoU", "95 % interval", "pick", "absent refused", "present refused", "tokens"]
    command = f"`lavis-svp evaluate --cfg-path projects/svp/eval/{SHIPPED[SHORT]}.yaml`"
    return "\n".join([table(heads, rows), "", f"First row: {command}"])


def card() -> str:
    """What the shipped weights find in RefPhotos: by clutter, size, kind, and group of nouns."""
    content, beside = load("photographs_refphotos"), load("zero_shot_refphotos")["groups"]
    found = {"all": content["with_target"]}
    found |= {f"kind {name}": one for name, one in content["by_kind"].items() if one["n_target"]}
    for tag in ("clutter", "size", "what", "group"):
        found |= {f"{tag} {name}": one for name, one in content["by_tag"][tag].items() if one["n_target"]}
    rows = []
    for name, one in found.items():
        scores = [one["giou"], one["pick_inside"], pick_of_all(one), one["seg_miss_rate"]]
        rows.append([name, str(one["n_target"]), *map(number, scores)])
        rows[-1] += [number(beside[name][key]) for key in ("chance", "pick", "iou", "single", "sam_at_centre")]
    heads = ["expressions", "number", "gIoU", "pick of answered", "pick of all", "refused", "chance"]
    heads.append("classifier alone, pick")
    return table([*heads, "classifier alone, IoU", "one region", "SAM at the centre"], rows)


def channel() -> str:
    """Short trainings with and without the classifier, and with other layers; mean ± half the range over seeds."""
    content = load("channel_trials")
    rows = []
    for name, trial in content["trials"].items():
        seeds = trial["seeds"]
        cells = [name, ", ".join(seeds)]
        for test in ("refphotos", "trainphotos"):
            for key in ("giou", "pick_inside", "absent_refused", "present_refused"):
                cells.append(spread([one[test][key] for one in seeds.values()]))
        rows.append(cells)
    heads = ["training", "seeds"]
    for test in ("RefPhotos", "held out of TrainPhotos"):
        heads += [f"{test}: gIoU", "pick", "absent refused", "present refused"]
    run = content["run"]
    return "\n\n".join([table(heads, rows), f"`{run['command']}`, {run['date'][:10]}, one thread each."])


def times() -> str:
    """From a photograph's file to its mask, by part."""
    content = load("photo_times")
    run, medians = content["run"], content["medians"]
    rows = [["**from file to mask**", f"**{number(content['total'], 2)}**"]]
    rows += [[name, number(seconds, 2)] for name, seconds in medians.items()]
    note = (
        f"Medians over {content['photos']} photographs of RefPhotos, one expression each, the weights loaded; the "
        f"slowest took {number(content['slowest'], 2)} s. `{run['command']}`, {run['date'][:10]}, "
        f"{run['machine']['cpus']} CPUs, {run['machine']['threads']} threads."
    )
    return "\n\n".join([table(["part", "seconds"], rows), note])


def sides() -> str:
    """The trained model at several sides of SAM's input, on what TrainPhotos and RefThings hold out."""
    content = load("photo_sides")
    names = list(content["val"])
    rows = [
        [side, *(number(content["val"][name][side][key]) for name in names for key in SIDE_SCORES)]
        for side in content["val"][names[0]]
    ]
    heads = ["side"]
    for name in names:
        heads += [f"`{name}`, val: {title}" for title in SIDE_SCORES.values()]
    run = content["run"]
    return "\n\n".join([table(heads, rows), f"`{run['command']}`, {run['date'][:10]}, one thread."])


def trials() -> str:
    """What short trainings score on RefPhotos."""
    content = load("photo_trials")
    rows = [_trial(name, trial["refphotos"]) for name, trial in content["trials"].items()]
    heads = ["trial", "gIoU", "pick", "pick, few", "pick, scenes", "absent refused", "present refused"]
    notes = [f"- **{name}**: {trial['training']}" for name, trial in content["trials"].items()]
    return "\n\n".join([table(heads, rows), "\n".join(notes), content["note"]])


def _trial(name: str, scores: Mapping[str, Any]) -> list[str]:
    both, clutter = scores["with_target"], scores["by_tag"]["clutter"]
    picks = [both["pick_inside"], clutter["few"]["pick_inside"], clutter["scene"]["pick_inside"]]
    refused = [scores["no_target"]["n_acc"], both["seg_miss_rate"]]
    return [name, *(number(value) for value in (both["giou"], *picks, *refused))]


def choices() -> str:
    """The classifier's side, and the temperature at which regions that look alike are asked together."""
    content = load("class_choices")
    rows = [
        [side, temperature.replace("None", "each alone"), *(number(means[key]) for key in ("chance", "pick", "iou"))]
        for side, by_temperature in content["found"].items()
        for temperature, means in by_temperature.items()
    ]
    run = content["run"]
    origin = f"`{run['command']}`, {run['date'][:10]}, {run['machine']['cpus']} CPUs; TrainPhotos, 396 bare names."
    return "\n\n".join([table(["side", "temperature", "chance", "pick", "IoU of the joined regions"], rows), origin])


BLOCKS: dict[str, Callable[[], str]] = {
    "photo_shipped": shipped,
    "photo_short": short,
    "photo_card": card,
    "photo_beside": beside,
    "channel_trials": channel,
    "photo_sides": sides,
    "photo_times": times,
    "photo_trials": trials,
    "class_choices": choices,
}
