"""What is worth knowing about a run, to stand in its summary."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
from typing import Any

import torch


def digest(settings: Any) -> str:
    """First 12 hexadecimal digits of the sha256 of JSON-able settings, the same for equal settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def command_line() -> str:
    """The command that started this process, without paths of this machine's Python or packages."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started = [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return shlex.join(["python", *started, *sys.argv[1:]])


def run_facts() -> dict[str, Any]:
    """When, how and on what this process runs."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
    }
