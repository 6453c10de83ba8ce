"""What a reader is warned of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.load.metrics import summarise
from bench.load.report import Result, table, warnings
from bench.load.sender import COMPLETED, Record


@pytest.fixture
def result() -> Result:
    """Of ten good requests."""
    records = [
        Record(number=i, due_s=0.0, began_s=0.001, ended_s=0.2, status=COMPLETED, arrivals_s=[0.1], tokens=[1])
        for i in range(10)
    ]
    return Result(
        command="lightqwen bench",
        date="2026-11-25T12:00:00+00:00",
        target="127.0.0.1:1",
        workload="10 requests",
        left_out=0,
        options={"concurrency": None},
        client={},
        server={"device": "cpu", "dtype": "float32", "tensor_parallel_size": 1, "version": "1"},
        model={"name": "m"},
        interrupted=False,
        planned=10,
        cpu_shares=[0.2, 0.3],
        summary=summarise(records, {}),
        records=records,
    )


def test_good_run_has_no_warning(result: Result) -> None:
    assert list(warnings(result)) == []
    assert "warning" not in table(result)


def test_client_at_its_limit(result: Result) -> None:
    (warning,) = warnings(replace(result, cpu_shares=[0.2, 0.93]))
    assert "93% of a core" in warning
    assert "--processes" in warning
    assert f"warning: {warning}" in table(replace(result, cpu_shares=[0.2, 0.93]))


def test_requests_sent_late(result: Result) -> None:
    late = [replace(record, began_s=0.05) for record in result.records]
    sent_late = replace(result, summary=summarise(late, {}))
    (warning,) = warnings(sent_late)
    assert "50 ms after they were due" in warning
    assert list(warnings(replace(sent_late, options={"concurrency": 4}))) == [], "there, waiting is what was asked for"


def test_outputs_that_the_context_cut(result: Result) -> None:
    full = [replace(record, finish_reason="CONTEXT_FULL") for record in result.records[:3]]
    (warning,) = warnings(replace(result, summary=summarise(full, {})))
    assert warning.startswith("3 outputs ended early")


def test_lines_of_a_trace_that_were_left_out(result: Result) -> None:
    assert "7 left out as too long" in table(replace(result, left_out=7))
