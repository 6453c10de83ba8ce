"""The chart's tests run where its tools install (make test-helm); elsewhere they are skipped, and say why."""

from __future__ import annotations

import sys

import pytest

from tests.helm.chart import TOOLS, why_no_tools

# Last, so that what the project itself has goes before.
sys.path.append(str(TOOLS / "python"))


@pytest.fixture(autouse=True, scope="session")
def chart_tools() -> None:
    reason = why_no_tools()
    if reason is not None:
        pytest.skip(f"chart tests: {reason}")
