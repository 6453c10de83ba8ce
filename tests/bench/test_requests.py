"""What is sent, and when."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.command import divide
from bench.load.errors import LoadError
from bench.load.options import LoadOptions, add_options
from bench.load.requests import LoadRequest, Workload, arrivals, make_workload


def options(*arguments: str) -> LoadOptions:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    return LoadOptions.of(parser.parse_args(arguments))


def workload(*arguments: str, vocab_size: int = 1000, context_length: int = 4096) -> Workload:
    return make_workload(options(*arguments), vocab_size=vocab_size, context_length=context_length)


def ids(request: LoadRequest) -> list[int]:
    assert isinstance(request.prompt, array)
    return request.prompt.tolist()


# ---- random input ----------------------------------------------------------------------------------------------------


def test_lengths_are_drawn_from_the_ranges_and_reach_their_ends() -> None:
    requests = workload("--num-requests", "400", "--input-len", "3:6", "--output-len", "2:4").requests
    assert {request.prompt_tokens for request in requests} == {3, 4, 5, 6}
    assert {request.max_tokens for request in requests} == {2, 3, 4}
    assert all(request.ignore_eos for request in requests)
    assert all(0 <= token < 1000 for request in requests for token in ids(request))


def test_same_seed_same_requests_and_another_is_another() -> None:
    arguments = ("--input-len", "5:50", "--output-len", "5:50", "--request-rate", "3")
    assert workload(*arguments) == workload(*arguments)
    assert workload(*arguments).requests != workload(*arguments, "--seed", "1").requests


def test_ids_stay_below_where_special_tokens_begin() -> None:
    requests = workload("--input-len", "1000", vocab_size=151_936).requests
    assert max(max(ids(request)) for request in requests) < 10_000


def test_mixed256_is_the_published_workload() -> None:
    requests = workload("--workload", "mixed256").requests
    assert sum(len(ids(request)) for request in requests) == 142_827
    assert sum(request.max_tokens for request in requests) == 133_966
    assert all(max(ids(request)) < 1000 for request in requests), "a small model knows fewer ids"


def test_request_that_does_not_fit_the_context_is_refused_with_a_remedy() -> None:
    arguments = ("--input-len", "90", "--output-len", "20")
    with pytest.raises(LoadError, match=r"90 tokens and wants 20 more.* 109 tokens.*--input-len.*--max-model-len"):
        workload(*arguments, context_length=109)
    assert workload(*arguments, context_length=110)


# ---- traces ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = [
        {"timestamp": 5000, "input_length": 20, "output_length": 3, "hash_ids": [7, 8, 9]},
        {"timestamp": 5500, "input_length": 14, "output_length": 4, "hash_ids": [7, 11]},
        {"timestamp": 6000, "prompt": "What?", "output_length": 5},
        {"timestamp": 9000, "token_ids": [1, 2]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_trace_lines_become_requests(trace: Path) -> None:
    made = workload("--trace", str(trace), "--time-scale", "0.001", "--output-len", "9")
    assert [request.prompt_tokens for request in made.requests] == [20, 14, None, 2]
    assert [request.max_tokens for request in made.requests] == [3, 4, 5, 9]
    assert [request.ignore_eos for request in made.requests] == [True, True, False, False]
    assert [request.due_s for request in made.requests] == pytest.approx([0.0, 0.5, 1.0, 4.0])
    assert made.description == f"4 requests, from {trace}; at the trace's times, 4.0 s in all"


def test_equal_hash_ids_are_equal_blocks(trace: Path) -> None:
    first, second = (ids(request) for request in workload("--trace", str(trace), "--hash-block-size", "8").requests[:2])
    assert (len(first), len(second)) == (20, 14)
    assert first[:8] == second[:8]
    assert first[8:14] != second[8:14]
    unshared, other = (ids(request) for request in workload("--trace", str(trace)).requests[:2])
    assert unshared[:8] != other[:8]


def test_rate_replaces_the_times_of_a_trace(trace: Path) -> None:
    made = workload("--trace", str(trace), "--request-rate", "4", "--burstiness", "inf")
    assert [request.due_s for request in made.requests] == pytest.approx([0, 0.25, 0.5, 0.75])
    made = workload("--trace", str(trace), "--request-rate", "inf")
    assert [request.due_s for request in made.requests] == [0, 0, 0, 0]


def test_lines_that_do_not_fit_are_refused_or_left_out(trace: Path) -> None:
    with pytest.raises(
        LoadError, match=r"line 1 of .*trace.jsonl is 20 tokens and wants 3 more.*\(1 of 4.*--skip-long"
    ):
        workload("--trace", str(trace), "--output-len", "2", context_length=22)
    made = workload("--trace", str(trace), "--skip-long", "--output-len", "2", context_length=22)
    assert made.left_out == 1
    assert len(made.requests) == 3
    assert made.requests[0].due_s == 0, "time begins with the first that is sent"
    with pytest.raises(LoadError, match="no request of"):
        workload("--trace", str(trace), "--skip-long", "--num-requests", "1", context_length=22)


def test_scale_without_times_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 5}\n')
    assert workload("--trace", str(path)).requests[0].due_s == 0
    with pytest.raises(LoadError, match="--time-scale has nothing to scale"):
        workload("--trace", str(path), "--time-scale", "0.5")


# ---- arrivals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    gaps = np.diff(arrivals(200_000, 8.0, burstiness, np.random.default_rng(3)))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)


def test_infinite_burstiness_is_even_and_infinite_rate_is_at_once() -> None:
    rng = np.random.default_rng(0)
    assert arrivals(4, 2.0, math.inf, rng) == [0, 0.5, 1.0, 1.5]
    assert arrivals(3, math.inf, 1.0, rng) == [0, 0, 0]
    assert arrivals(1, 5.0, 1.0, rng) == [0]


@pytest.mark.parametrize(
    ("arguments", "when"),
    [
        ((), "all at once"),
        (("--concurrency", "4"), "4 in flight"),
        (("--request-rate", "2"), "2 a second, Poisson"),
        (("--request-rate", "0.5", "--burstiness", "inf"), "0.5 a second, evenly spaced"),
        (
            ("--request-rate", "2", "--burstiness", "3", "--concurrency", "9"),
            "9 in flight at most, 2 a second, burstiness 3",
        ),
    ],
)
def test_description_says_when(arguments: tuple[str, ...], when: str) -> None:
    assert workload(*arguments).description == f"100 requests, 128 tokens in, 128 out; {when}"


# ---- options that do not go together ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--time-scale", "2"], "--time-scale needs --trace"),
        (["--hash-block-size", "16"], "--hash-block-size needs --trace"),
        (["--skip-long"], "--skip-long needs --trace"),
        (["--trace", "t", "--input-len", "5"], "--input-len is for random input"),
        (["--trace", "t", "--request-rate", "5", "--time-scale", "2"], "--time-scale scales"),
        (["--burstiness", "2"], "--burstiness needs --request-rate"),
        (["--workload", "mixed256", "--trace", "t"], "--trace does not go with --workload mixed256"),
        (["--workload", "mixed256", "--num-requests", "3"], "--num-requests does not go with"),
        (["--workload", "mixed256", "--output-len", "3"], "--output-len does not go with"),
        (["--details"], "--details needs --json FILE"),
        (["--json", "no/such/folder/x.json"], "no/such/folder"),
        (["--html", "no/such/folder/x.html"], "no/such/folder"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], words: str) -> None:
    with pytest.raises(LoadError, match=words):
        options(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input-len", "0"],
        ["--input-len", "9:3"],
        ["--input-len", "1:2:3"],
        ["--input-len", "many"],
        ["--num-requests", "0"],
        ["--warmup", "-1"],
        ["--request-rate", "0"],
        ["--request-rate", "nan"],
        ["--timeout", "inf"],
        ["--goodput", "itl:5"],
        ["--goodput", "ttft"],
        ["--goodput", "ttft:-5"],
        ["--output", "audio"],
    ],
)
def test_value_that_cannot_be(arguments: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError, match=arguments[0]):
        options(*arguments)


# ---- dealing them out ------------------------------------------------------------------------------------------------


@given(
    num=st.integers(1, 60),
    concurrency=st.one_of(st.none(), st.integers(1, 80)),
    processes=st.integers(1, 12),
    connections=st.integers(1, 20),
    warmup=st.integers(0, 20),
)
def test_processes_share_requests_concurrency_connections_and_warm_up(
    num: int, concurrency: int | None, processes: int, connections: int, warmup: int
) -> None:
    arguments = ["--num-requests", str(num), "--input-len", "1", "--processes", str(processes), "--warmup", str(warmup)]
    arguments += ["--connections", str(connections)]
    if concurrency is not None:
        arguments += ["--concurrency", str(concurrency)]
    made = workload(*arguments)
    shares = divide(made, options(*arguments), {})
    assert len(shares) <= processes
    numbered = sorted(itertools.chain(*(share.requests for share in shares)), key=lambda pair: pair[0])
    assert numbered == list(enumerate(made.requests))
    assert sum(len(share.warmup) for share in shares) == warmup
    streams = min(num, concurrency or num)
    assert sum(share.connections for share in shares) == max(len(shares), min(connections, streams))
    assert min(share.connections for share in shares) >= 1
    parts = [share.concurrency for share in shares]
    if concurrency is None:
        assert set(parts) == {None}
    else:
        whole = [part for part in parts if part is not None]
        assert sum(whole) == min(concurrency, num)
        assert 1 <= min(whole) <= max(whole) <= min(whole) + 1
