"""The tools that these tests run, from the PATH or from where `make` puts them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "build" / "tools" / "prometheus" / "usr" / "bin"

Promtool = Callable[..., "subprocess.CompletedProcess[str]"]


def find_tool(name: str) -> str:
    """Path of a program of the Debian package prometheus; skips the test where it is not installed."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}{TOOLS}")
    if found is None:
        pytest.skip(f"no {name}: install the Debian package prometheus (tests/observability/tools.sh)")
    return found


@pytest.fixture(scope="session")
def promtool() -> Promtool:
    """Run promtool with these arguments."""
    path = find_tool("promtool")

    def run(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [path, *(str(argument) for argument in arguments)]
        return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=55, check=False)

    return run
