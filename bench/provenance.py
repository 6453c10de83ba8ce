"""Where figures come from: what every benchmark writes beside them."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def provenance(module: str) -> dict[str, Any]:
    """The command (`module` as given to `python -m`), what it goes without, commit, date, hardware and load."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "without": without(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
    }


def json_file(text: str) -> Path:
    """Read `--json FILE`, for argparse: a place that cannot be written to is told before minutes are spent."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: name a file in a folder that is there")
    return path


def without() -> str:
    """What this process and those that it starts go without, as LIGHTQWEN_WITHOUT names it."""
    return os.environ.get("LIGHTQWEN_WITHOUT", "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
