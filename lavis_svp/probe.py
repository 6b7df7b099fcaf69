"""Probe a trained model: ``python -m lavis_svp.probe WHAT --cfg-path a.yaml [--checkpoint file] [--options ...]``.

WHAT is ``errors`` (where points are lost), ``sspe`` (scores with SSPE, or the tokens, disturbed), ``tokens`` (linear
read-outs of what the tokens know) or ``absence`` (what tells that there is no such thing; fits ``model.presence``). The
weights are found as by ``lavis_svp.evaluate``. The result goes to
``<run.output_dir>/result/probe_<WHAT>.json`` or to ``--out``, and a table of it to the screen. See docs/probes.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_svp import evaluate, launch

if TYPE_CHECKING:
    from lavis_svp.probes.session import Session

TRAINING_IMAGES = 400
SEEDS = (0, 1)
REFUSED = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one probe on the first of ``run.test_splits``."""
    parser = launch.build_parser("Probe a trained svp_ris.", need_config=False)
    parser.add_argument("what", choices=list(_PROBES))
    parser.add_argument("--checkpoint", help="a checkpoint, or a folder of which the newest is taken")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--images", type=int, default=TRAINING_IMAGES, help="training images that means and read-outs are made of"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of shuffles, swaps and fits")
    parser.add_argument(
        "--targets", nargs="+", help="what `sspe` disturbs: sspe sspe_ssa sspe_tokens tokens; all of it"
    )
    parser.add_argument("--modes", nargs="+", help="how: average shuffle swap zero reorder; all of them")
    parser.add_argument("--fit-on", default="val", help="`absence`: one of run.test_splits, not the first")
    parser.add_argument("--refused", type=float, default=REFUSED, help="`absence`: largest share refused of a kind")
    args = parser.parse_args(arguments)
    if not args.cfg_path and not args.checkpoint:
        parser.error("give --cfg-path, --checkpoint, or both")
    if args.images < 2:
        parser.error(f"--images must be at least 2, got {args.images}")
    checkpoint, config = launch.configure(lambda: evaluate.read_command(args))
    launch.run_command(lambda: _probe(args, config, checkpoint))


def _probe(args: argparse.Namespace, config: Any, checkpoint: Path | None) -> None:
    import torch

    from lavis_svp.metrics.files import write_json
    from lavis_svp.probes.session import Session
    from lavis_svp.tasks.svp_task import result_folder

    runner = evaluate.loaded_runner(config, checkpoint)
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

    judged = (error_row(answer) for answer in session.answers("Judging"))
    rows = [row for row in judged if row is not None]
    table = error_table(rows)
    return {"groups": table, "rows": rows}, format_errors(table)


def _sspe(args: argparse.Namespace, session: Session) -> tuple[dict[str, Any], str]:
    from lavis_svp.probes.comparison import compare, disturbances, format_comparison
    from lavis_svp.probes.disturb import collect

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
    from lavis_svp.probes.tokens import gather_shown, read_all
    from lavis_svp.probes.variance import format_tokens, variance_shares

    train = gather_shown(session.model, session.training(args.images), seed=0)
    test = gather_shown(session.model, session.held_out(), seed=0)
    places = read_all(train, test, args.seeds, session.runner.task.options.bootstrap)
    result = {
        "training_images": train.count,
        "test_images": test.count,
        "seeds": args.seeds,
        "places": places,
        "variance": variance_shares(train),
    }
    return result, format_tokens(result)


def _absence(args: argparse.Namespace, session: Session) -> tuple[dict[str, Any], str]:
    from lavis_svp.probes.absence import absence_table, format_absence, gather_evidence

    if args.fit_on == session.split:
        raise ValueError(f"--fit-on {args.fit_on} is the split that is judged; fit on other images.")
    fitted_on = gather_evidence(session.model, session.split_batches(args.fit_on))
    table = absence_table(fitted_on, gather_evidence(session.model, session.held_out()), args.refused)
    return {"fitted_on": args.fit_on, **table}, format_absence(table)


_PROBES = {"errors": _errors, "sspe": _sspe, "tokens": _tokens, "absence": _absence}


if __name__ == "__main__":
    main()
