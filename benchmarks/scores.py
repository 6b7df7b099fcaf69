"""Keep the summaries of scored runs, and make the tables of the shipped weights, the answers and the reports.

    python benchmarks/scores.py add shipped_refshapes SUMMARY.json   keep a summary as results/NAME.json
    python benchmarks/scores.py learned QUESTION RUN FOLDER COMMIT   read a scored run into results/learning.json
    python benchmarks/tables.py                                      then rewrites the pages

A summary is the result/*.summary.json of a run. One named shipped_DATA (svp_ris_tiny) or photographs_DATA
(svp_ris_tiny_photos) is taken only if it scored the weights that the package holds. QUESTION names a table of
reports/learning.md (a run may stand in several), FOLDER is the run's ``run.output_dir``, COMMIT is of the code that ran
it, under whose defaults its command holds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import photo_tables
import results
from results import BASELINES, KINDS, interval, load, number, table, today

from lavis_svp.datasets.refshapes.config import ATTRIBUTES
from lavis_svp.zoo.shipped import read_record

SHIPPED = {  # what the shipped weights are scored on, and the YAML of projects/svp/eval/ that does it
    "refshapes": "refshapes_seg_tiny",
    "refshapes_fresh": "refshapes_fresh_tiny",
    "photos": "photos_tiny",
}
FILES = {  # first word of a result's name -> the weights that it scored, and what these are scored on
    "shipped": ("svp_ris_tiny", SHIPPED),
    "photographs": ("svp_ris_tiny_photos", photo_tables.SHIPPED),
}
ANSWERS = ("vqa", "vqa_more", "caption", "segmentation", "segmentation_before")
CAPTION_SCORES = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
FEATURES = {"DINOv2": "none", "and SAM's embedding": "sam", "and the patch's colour": "sam_colour"}
QUESTIONS = (
    "beside",
    "rates",
    "shuffle",
    "decoder",
    "positions",
    "places",
    "aids",
    "length",
    "batch",
    "budget",
    "paper",
)
QUESTIONS += ("language",)
OWN_FOLDER = re.compile(r" ?run\.output_dir=\S+| --options$")
PROBES = {  # which function of lavis_svp.probes makes the table of a probe
    "errors": "errors:format_errors",
    "sspe": "disturb:format_comparison",
    "tokens": "tokens:format_tokens",
    "absence": "no_target:format_no_target",
}


def add(name: str, summary: Path) -> Path:
    """Keep a summary, with folders of this machine cut out of its command.

    Raises:
        ValueError: no run section, or the name is one of the shipped weights' and it scored another file than the
            package holds.
    """
    content = json.loads(summary.read_text())
    if "run" not in content:
        raise ValueError(f"{summary} has no 'run' section; name the .summary.json that a run wrote.")
    kind, _, data = name.partition("_")
    if kind in FILES:
        weights, tests = FILES[kind]
        if data not in tests:
            raise ValueError(f"{weights} is scored on {', '.join(tests)}; got '{data}'.")
        held = {"name": weights, "sha256": (read_record(weights) or {}).get("sha256")}
        if (used := content["run"].get("shipped_weights")) != held:
            raise ValueError(
                f"{summary} was scored with {used or 'other weights than the shipped ones'}, the package holds {held}. "
                f"Score the file as shipped: {shipped_command(data, tests)}"
            )
    content["run"]["command"] = results.without_machine(content["run"]["command"])
    return results.store(name, content, sort_keys=True)


def learned(question: str, name: str, folder: Path, commit: str) -> Path:
    """Read a finished and scored run into the table of a question of reports/learning.md."""
    summary, last = json.loads(results.newest_summary(folder).read_text()), results.last_step(folder)
    run, kinds, command = summary["run"], summary["by_kind"], summary["run"]["command"]
    while OWN_FOLDER.search(command):
        command = OWN_FOLDER.sub("", command)
    keys = ("giou", "pick_accuracy", "seg_miss_rate")
    entry = {"question": question, "name": name, "seed": run["seed"], "commit": commit, "date": run["date"][:10]}
    entry |= {"giou": summary["headline"]["giou_macro"], "giou_ci": summary["headline"]["giou_macro_ci"]}
    entry |= {"kinds": {kind: {key: kinds[kind][key] for key in keys} for kind in KINDS}}
    entry |= {"n_acc": summary["overall"]["n_acc"], "tokens": summary["overall"]["tokens_per_image"]}
    entry |= {"steps": last["train_iters"], "grounding": last.get("train_loss_ground")}
    entry |= {"threads": run["machine"]["threads"], "command": results.without_machine(command)}
    others = [e for e in load("learning") if (e["question"], e["name"], e["seed"]) != (question, name, entry["seed"])]
    return results.store("learning", [*others, entry], sort_keys=True)


def shipped_command(data: str, tests: Mapping[str, str] = SHIPPED) -> str:
    """The command that scores the shipped weights on a data set."""
    return f"lavis-svp evaluate --cfg-path projects/svp/eval/{tests[data]}.yaml"


def summaries(found: dict[str, dict[str, Any]]) -> str:
    """Summaries with every kind of expression, each above its baselines, and the run of each."""
    heads = ["data", "gIoU", "95 % interval", *KINDS, "pick", "cIoU", "N-acc", "teacher-forced", "tokens"]
    rows: list[list[str]] = []
    notes = []
    for label, one in found.items():
        head, kinds, overall, run = one["headline"], [one["by_kind"][k] for k in KINDS], one["overall"], one["run"]
        cells = [label, f"**{number(head['giou_macro'])}**", interval(head["giou_macro_ci"])]
        cells += [f"{number(kind['giou'])} ({interval(kind['giou_ci'])})" for kind in kinds]
        cells += [number(value) for value in (head["pick_accuracy_macro"], head["ciou_macro"], overall["n_acc"])]
        cells.append(number(one.get("teacher_forced", {}).get("headline", {}).get("giou_macro")))
        rows.append([*cells, number(overall["tokens_per_image"], 1)])
        for name, key in BASELINES.items():
            baseline = [f"*{name}*", number(head[f"{key}_macro"]), "", *(number(kind[key]) for kind in kinds)]
            rows += [] if baseline in rows else [baseline]
        file = (run.get("shipped_weights") or {}).get("sha256")
        notes.append(
            f"- {label}: `{today(run['command'])}` ({run['date'][:10]}, {run['machine']['cpus']} CPUs; {overall['n']} "
            f"expressions on {overall['n_images']} images; seed {run['seed']}"
            f"{f'; file sha256 `{file[:12]}`' if file else ''})"
        )
    return "\n".join([table(heads, rows), "", *notes])


def shipped_full() -> str:
    """The shipped weights on all their data."""
    return summaries({data: load(f"shipped_{data}") for data in SHIPPED})


def switched() -> str:
    """The shipped weights of release 0.4, trained with SAM's superpixels, with each kind: no training in between."""
    heads = [
        "data",
        "superpixels",
        "gIoU",
        "95 % interval",
        "cIoU",
        "pick",
        "N-acc",
        "tokens",
        "best single superpixel",
    ]
    rows, commands = [], []
    for data in SHIPPED:
        for superpixels in ("sam", "one_pass"):
            one = load(f"switched_{data}_{superpixels}")
            head, overall = one["headline"], one["overall"]
            cells = [data, f"`{superpixels}`", f"**{number(head['giou_macro'])}**", interval(head["giou_macro_ci"])]
            cells += [number(value) for value in (head["ciou_macro"], head["pick_accuracy_macro"], overall["n_acc"])]
            rows.append([*cells, number(overall["tokens_per_image"], 1), number(head["ceiling_single_macro"])])
            run = one["run"]
            commands.append(
                f"`{superpixels}` on {data}: {run['date'][:10]}, sha256 `{run['shipped_weights']['sha256'][:12]}`"
            )
    return "\n".join([table(heads, rows), "", "; ".join(commands) + "."])


def first_recipe(data: str) -> str:
    """The first recipe with different superpixels on a data set: results/DATA__LABEL_seedN.json."""
    names = [path.stem for path in sorted(results.RESULTS.glob(f"{data}__*.json"))]
    return summaries({name.partition("__")[2].replace("_seed", ", seed "): load(name) for name in names})


def answering() -> str:
    """Answers, captions and what joint training leaves of segmentation; and the commands."""
    found = {name: load(f"answering_{name}") for name in ANSWERS}
    vqa, caption = found["vqa"], found["caption"]
    groups = [*vqa["by_kind"].items(), ("all", vqa["overall"])]
    answers = [
        [kind, str(one["n"]), f"**{one['accuracy']:.1f}**", interval(one["accuracy_ci"], 1)]
        + [number(one[key], 1) for key in ("baseline_majority", "blind")]
        for kind, one in groups
    ]
    names = [name for name in CAPTION_SCORES if name in caption["scores"]]
    captions = [
        [label, *(number(caption[key][name]) for name in names)]
        for label, key in (("its image", "scores"), ("another image", "blind"))
    ]
    masks = []
    for label, one in (("before joint training", found["segmentation_before"]), ("after", found["segmentation"])):
        values = [one["headline"]["giou_macro"], *(one["by_kind"][kind]["giou"] for kind in KINDS)]
        masks.append([label, *map(number, [*values, one["teacher_forced"]["headline"]["giou_macro"]])])
    notes = [
        f"- {name}: `{today(run['command'])}`, seed {run['seed']}, {run['date'][:10]}, {run['machine']['cpus']} CPUs."
        for name, run in ((name, content["run"]) for name, content in found.items())
    ]
    heads = ["questions", "n", "accuracy, %", "95 % interval", "commonest answer, %", "another image, %"]
    parts = [table(heads, answers), table(["caption of", *names], captions)]
    parts.append(table(["segmentation", "gIoU", *KINDS, "gIoU, [SEG] given"], masks))
    return "\n\n".join([*parts, "\n".join(notes)])


def features() -> str:
    """Read-outs of the attributes from the channels of a patch, without any training."""
    places = {label: load(f"features_{name}") for label, name in FEATURES.items()}
    rows, notes = [], []
    for label, result in places.items():
        found = [result["places"]["encoder"][name] for name in ATTRIBUTES]
        rows.append([label, *(f"{one['accuracy']:.3f} ({interval(one['ci'])})" for one in found)])
        notes.append(f"- {label}: `{today(result['run']['command'])}` ({result['run']['date'][:10]})")
    rows.append(["*most frequent class*", *(number(one["majority"]) for one in found)])
    return "\n".join([table(["channels of a patch", *ATTRIBUTES], rows), "", *notes])


def runs(question: str) -> str:
    """The runs of one question of reports/learning.md: scores by kind, picks, and their commands."""
    found = [run for run in load("learning") if run["question"] == question]
    rows = []
    for run in found:
        kinds = [run["kinds"][kind] for kind in KINDS]
        rows.append(
            [run["name"], str(run["steps"]), str(run["seed"]), f"**{run['giou']:.3f}**", interval(run["giou_ci"])]
        )
        rows[-1] += [number(kind["giou"]) for kind in kinds]
        rows[-1] += [" / ".join(number(kind[key], 2) for kind in kinds) for key in ("pick_accuracy", "seg_miss_rate")]
        rows[-1] += [number(run["n_acc"], 2), number(run["grounding"], 2)]
    heads = ["run", "steps", "seed", "gIoU", "interval", *KINDS, "pick", "[SEG] missed", "N-acc", "last grounding loss"]
    notes = [
        f"- {run['name']}: `{today(run['command'])}` ({run['commit']}, {run['date']}, {run['threads']} thread)"
        for run in found
    ]
    return "\n".join([table(heads, rows), "", *notes])


def probe(name: str) -> str:
    """One probe's table, and the run that made it."""
    result = load(f"probe_{name}")
    run, (module, _, function) = result["run"], PROBES[name].partition(":")
    shown = getattr(importlib.import_module(f"lavis_svp.probes.{module}"), function)
    body = shown(result["groups"] if name == "errors" else result)
    facts = [f"`{today(run['command'])}`", run["date"][:10], f"{run['machine']['cpus']} CPUs", f"seed {run['seed']}"]
    return f"```text\n{body}\n```\n\n{', '.join([*facts, run['weights']])}."


BLOCKS: dict[str, Callable[[], str]] = {
    "shipped_full": shipped_full,
    "switched": switched,
    "answering": answering,
    "features": features,
    **{f"first_recipe:{data}": partial(first_recipe, data) for data in ("refshapes", "photos")},
    **{f"runs:{question}": partial(runs, question) for question in QUESTIONS},
    **{f"probe:{name}": partial(probe, name) for name in PROBES},
}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("name")
    adding.add_argument("summary", type=Path)
    learning = commands.add_parser("learned")
    learning.add_argument("question", choices=QUESTIONS)
    learning.add_argument("run")
    learning.add_argument("folder", type=Path)
    learning.add_argument("commit")
    args = parser.parse_args()
    if args.command == "add":
        print(add(args.name, args.summary))
    else:
        print(learned(args.question, args.run, args.folder, args.commit))


if __name__ == "__main__":
    main()
