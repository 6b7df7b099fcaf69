"""Start ``train`` and ``evaluate`` in several processes, on one machine or many: ``--nproc``, ``--launcher``, ..."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

PORT = 29500  # where nodes meet, torch's own default
MODULE = "lavis_svp.cli"


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose processes and machines."""
    add = parser.add_argument_group("processes").add_argument
    add("--nproc", type=_at_least(1), metavar="N", help="processes on each machine, one per GPU (default: 1)")
    add(
        "--launcher",
        choices=("torch", "deepspeed"),
        default="torch",
        help="the program that starts the processes (default: torch)",
    )
    add("--nnodes", type=_at_least(1), metavar="M", help="machines; run the same command on each")
    text = "rank of this machine, from 0 (default: assigned by the launcher)"
    add("--node-rank", type=_at_least(0), metavar="R", help=text)
    add("--master-addr", metavar="HOST", help="name of the first machine")
    text = f"port at which the processes connect (default: {PORT})"
    add("--master-port", type=_at_least(1), metavar="PORT", help=text)
    add("--hostfile", metavar="FILE", help="with --launcher deepspeed: machines to start processes on")


def launch_words(args: argparse.Namespace) -> list[str]:
    """Write the parsed options of :func:`add_launch_options` as words again, to hand them to another command."""
    names = ("nproc", "nnodes", "node_rank", "master_addr", "master_port", "hostfile")
    words = [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(args, name)) is not None]
    return words + (["--launcher=deepspeed"] if args.launcher == "deepspeed" else [])


def launch_command(args: argparse.Namespace) -> list[str]:
    """Build the Python module, with its arguments, that starts the processes; empty for this one process.

    Raises:
        ValueError: options that contradict each other.
    """
    return _deepspeed_command(args) if args.launcher == "deepspeed" else _torch_command(args)


def run_in_processes(command: str, argv: Sequence[str], args: argparse.Namespace) -> None:
    """Become the launcher of several processes of ``command`` on the words ``argv``, if ``args`` (parsed) choose it.

    Raises:
        ValueError: see :func:`launch_command`.
    """
    launcher = launch_command(args)
    if launcher:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_launch_options(parser)
        others = parser.parse_known_args(list(argv))[1]
        words = [sys.executable, "-m", *launcher, MODULE, command, *others]
        sys.stdout.flush()
        os.execv(sys.executable, words)


def run_child(words: Sequence[str], title: str) -> None:
    """Run a command to its end; a request to end this process is passed on to it.

    Raises:
        SystemExit: it failed; with its exit code, or a shell's for a signal.
    """
    process = subprocess.Popen(words)

    def pass_on(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:  # Ctrl-C reaches both by itself
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        print(f"error: {title} ended with code {code}; run the same command to go on.", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)


def _torch_command(args: argparse.Namespace) -> list[str]:
    """torch.distributed.run; nodes meet by rank, or in any order without --node-rank."""
    if args.hostfile:
        raise ValueError("--hostfile needs --launcher deepspeed; for torch, run this on every machine with --nnodes.")
    processes = args.nproc or 1
    if (args.nnodes or 1) == 1:
        if args.node_rank is not None or args.master_addr or args.master_port:
            raise ValueError("--node-rank, --master-addr and --master-port need --nnodes 2 or more.")
        words = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        return words if processes > 1 else []
    if not args.master_addr:
        raise ValueError(f"--nnodes {args.nnodes} needs --master-addr, the name of the first machine.")
    port = args.master_port or PORT
    words = ["torch.distributed.run", f"--nnodes={args.nnodes}", f"--nproc_per_node={processes}"]
    if args.node_rank is None:
        meeting = ["--rdzv_backend=c10d", "--rdzv_id=lavis-svp", f"--rdzv_endpoint={args.master_addr}:{port}"]
    elif args.node_rank >= args.nnodes:
        raise ValueError(f"--node-rank must be below --nnodes {args.nnodes}, got {args.node_rank}.")
    else:
        meeting = [f"--node_rank={args.node_rank}", f"--master_addr={args.master_addr}", f"--master_port={port}"]
    return [*words, *meeting, "-m"]


def _deepspeed_command(args: argparse.Namespace) -> list[str]:
    """DeepSpeed's launcher, which starts the processes of all machines from one."""
    if args.node_rank is not None:
        raise ValueError("--node-rank is for --launcher torch; deepspeed starts all machines of --hostfile itself.")
    words = ["deepspeed.launcher.runner", "--no_local_rank"]
    if args.hostfile:
        if not Path(args.hostfile).is_file():
            raise ValueError(f"--hostfile: there is no file '{args.hostfile}'.")
        words += ["--hostfile", args.hostfile]
        words += ["--num_nodes", str(args.nnodes)] if args.nnodes else []
        words += ["--num_gpus", str(args.nproc)] if args.nproc else []
        words += ["--master_addr", args.master_addr] if args.master_addr else []
    elif (args.nnodes or 1) > 1 or args.master_addr:
        raise ValueError("--launcher deepspeed needs --hostfile for more than one machine.")
    else:
        words += ["--num_gpus", str(args.nproc or 1)]
    words += ["--master_port", str(args.master_port)] if args.master_port else []
    return [*words, "--module"]


def _at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} on, got '{text}'")
        return int(text)

    return whole_number
