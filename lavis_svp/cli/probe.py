"""``lavis-svp probe``: look into a trained model, or fit its no-target calibration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_svp.cli.common import (
    add_device_option,
    add_old_flag,
    add_project_options,
    command_parser,
    process_group,
    user_errors,
)

if TYPE_CHECKING:
    from lavis_svp.probes.session import Session

DESCRIPTION = """\
Probe a trained svp_ris on the first of run.test_splits. WHAT is one of:
  errors     where points are lost: the share of each kind of mistake
  sspe       scores with SSPE's outputs, or the visual tokens, replaced
  tokens     linear read-outs of what the visual tokens know of objects
  no-target  what tells that there is no such thing; fits model.no_target
  zero-shot  what the image classifier alone finds, chance, and how far one region, regions and SAM can reach
The weights are found as by `lavis-svp evaluate`. The result goes to <run.output_dir>/result/probe_<WHAT>.json or to
--out, and a table of it to the screen."""
OLD_NAMES = {"absence": "no-target"}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp probe``."""
    parser = command_parser(
        "probe",
        DESCRIPTION,
        "lavis-svp probe errors --cfg-path projects/svp/train/refshapes_tiny.yaml --options model.load_finetuned=True",
    )
    add = parser.add_argument
    add("what", choices=[*_PROBES, *OLD_NAMES], metavar="WHAT", help=", ".join(_PROBES))
    add_project_options(parser, required=False)
    add("--checkpoint", help="a checkpoint, or a folder of which the newest is taken")
    add_device_option(parser, default=None)
    add("--out", type=Path, metavar="JSON", help="file for the result")
    add("--images", type=int, default=400, help="training images for means and read-outs (default: %(default)s)")
    add_old_flag(parser, "--pictures", "images", int)
    add("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the shuffles, swaps and fits")
    add("--targets", nargs="+", help="sspe: outputs to replace: sspe sspe_ssa sspe_tokens tokens (default: all)")
    add("--modes", nargs="+", help="sspe: replacements: average shuffle swap zero reorder (default: all)")
    add("--fit-on", default="val", help="no-target: one of run.test_splits, not the first (default: %(default)s)")
    text = "no-target: largest share of a kind with a target that may be refused (default: %(default)s)"
    add("--max-refused", type=float, default=0.05, metavar="SHARE", help=text)
    add_old_flag(parser, "--refused", "max_refused", float)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` are the words after it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.what = OLD_NAMES.get(args.what, args.what)
    if not args.cfg_path and not args.checkpoint:
        parser.error("give --cfg-path, --checkpoint, or both")
    if args.images < 2:
        parser.error(f"--images must be at least 2, got {args.images}")
    from lavis_svp.runners.project import config_to_evaluate, dot_list

    with user_errors(), process_group():
        options = dot_list(args.options) + ([f"run.device={args.device}"] if args.device else [])
        checkpoint, config = config_to_evaluate(args.cfg_path, args.checkpoint, options)
        _run(args, config, checkpoint)
    return 0


def _run(args: argparse.Namespace, config: Any, checkpoint: Path | None) -> None:
    import torch

    from lavis_svp.metrics.records import write_json
    from lavis_svp.probes.session import Session
    from lavis_svp.runners.project import runner_with_weights
    from lavis_svp.tasks.base import result_folder

    runner = runner_with_weights(config, checkpoint)
    splits = list(runner.options.test_splits)
    if not splits:
        raise ValueError("Nothing to probe: set run.test_splits.")
    finetuned = config.model_cfg.get("finetuned") if config.model_cfg.get("load_finetuned") else None
    weights = checkpoint.name if checkpoint else Path(finetuned or "untrained").name
    session = Session(runner, splits[0], weights)
    with torch.no_grad():
        result, table = _PROBES[args.what](args, session)
    path = args.out or result_folder("result_dir") / f"probe_{args.what}.json"
    write_json(path, {"run": session.facts(), "probe": args.what, **result})
    print(f"{table}\nResult: {path}", flush=True)


def _errors(args: argparse.Namespace, session: Session) -> tuple[dict[str, Any], str]:
    from lavis_svp.probes.errors import error_row, error_table, format_errors

    rows = [row for row in map(error_row, session.answers("Answering")) if row is not None]
    table = error_table(rows)
    return {"groups": table, "rows": rows}, format_errors(table)


def _sspe(args: argparse.Namespace, session: Session) -> tuple[dict[str, Any], str]:
    from lavis_svp.probes.disturb import collect, compare, disturbances, format_comparison

    model = session.model
    bank = collect(model.projector, (model.encode(samples) for samples in session.training(args.images)))
    result = compare(
        model.projector,
        bank,
        disturbances(model.projector, args.seeds, args.targets, args.modes),
        session.records,
        session.runner.task.options.bootstrap,
    )
    return {"training_images": len(bank), **result}, format_comparison(result)


def _tokens(args: argparse.Namespace, session: Session) -> tuple[dict[str, Any], str]:
    from lavis_svp.probes.tokens import format_tokens, gather_tokens, read_all, variance_shares

    train = gather_tokens(session.model, session.training(args.images), seed=0)
    test = gather_tokens(session.model, session.held_out(), seed=0)
    result = {
        "training_images": train.count,
        "test_images": test.count,
        "seeds": args.seeds,
        "places": read_all(train, test, args.seeds, session.runner.task.options.bootstrap),
        "variance": variance_shares(train),
    }
    return result, format_tokens(result)


def _no_target(args: argparse.Namespace, session: Session) -> tuple[dict[str, Any], str]:
    from lavis_svp.probes.no_target import format_no_target, gather_evidence, no_target_table

    if args.fit_on == session.split:
        raise ValueError(f"--fit-on {args.fit_on} is the split that is scored; fit on other images.")
    fit_split = gather_evidence(session.model, session.split_batches(args.fit_on))
    table = no_target_table(fit_split, gather_evidence(session.model, session.held_out()), args.max_refused)
    return {"fitted_on": args.fit_on, **table}, format_no_target(table)


def _zero_shot(args: argparse.Namespace, session: Session) -> tuple[dict[str, Any], str]:
    from lavis_svp.probes.zero_shot import format_zero_shot, zero_shot_rows, zero_shot_table

    rows = zero_shot_rows(session)
    table = zero_shot_table(rows)
    return {"groups": table, "rows": rows}, format_zero_shot(table)


_PROBES = {"errors": _errors, "sspe": _sspe, "tokens": _tokens, "no-target": _no_target, "zero-shot": _zero_shot}
