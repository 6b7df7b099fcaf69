"""``lavis-svp COMMAND ...``: finds the module of a sub-command and hands it the other arguments."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "segment": ("lavis_svp.cli.segment", "segment what an expression names in an image"),
    "train": ("lavis_svp.cli.train", "train a model as a project YAML says; several YAMLs in turn with --stages"),
    "evaluate": ("lavis_svp.cli.evaluate", "score a checkpoint, or the shipped weights"),
    "stages": ("lavis_svp.cli.train:stages", "train in stages with any launcher"),
    "ablation": ("lavis_svp.cli.rows:ablation", "train the rows of the paper's ablation"),
    "compare": ("lavis_svp.cli.rows:compare", "train the rows of the comparison of projectors"),
    "probe": ("lavis_svp.cli.probe", "find out what a trained model knows and where it fails"),
    "plan": ("lavis_svp.cli.plan", "estimate memory and time of a training before it starts"),
    "superpixels": ("lavis_svp.cli.superpixels", "make, draw, count and pack the superpixels of images"),
    "projectors": ("lavis_svp.cli.projectors", "list the projectors and what they cost"),
    "data": ("lavis_svp.cli.data", "check, pack and make data: doctor, shards, leaks, refshapes, refthings, photos"),
    "zoo": ("lavis_svp.cli.zoo", "list and convert the embedded pretrained weights"),
    "export": ("lavis_svp.cli.export", "get weights out of a training run"),
    "metrics": ("lavis_svp.cli.metrics", "score stored predictions"),
}
"""Sub-command: (module, or module:function where it is not ``main``; one line of help)."""


def overview() -> str:
    """The text of ``lavis-svp --help``."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: lavis-svp COMMAND [options]\n",
            "Semantic superpixels as the visual tokens of a multimodal LLM, for referring segmentation in LAVIS.\n",
            *(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
            "\nlavis-svp COMMAND --help explains a command and shows an example.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command on the words after ``lavis-svp``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from lavis_svp import __version__

        print(f"lavis-svp {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        print(f"error: Unknown command '{name}'.{hint} Known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(module), function or "main")(rest) or 0
