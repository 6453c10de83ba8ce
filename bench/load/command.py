"""`lightqwen bench` from beginning to end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc

from bench.load.errors import LoadError
from bench.load.fleet import Screen, choose_processes, run_fleet
from bench.load.metrics import summarise
from bench.load.options import LoadOptions, Range
from bench.load.page import page, require_matplotlib
from bench.load.report import Result, as_json, client_facts, facts, table
from bench.load.requests import Workload, make_workload
from bench.load.sender import Access, Share
from lightqwen.client import LightqwenError

ASK_TIMEOUT_S = 10.0
NOTHING_COMPLETED = 1
INTERRUPTED = 128 + 2  # what a shell reports after Ctrl-C

REMEDIES = {
    grpc.StatusCode.UNAVAILABLE: "is a server running there? `lightqwen serve` starts one, --target names another",
    grpc.StatusCode.DEADLINE_EXCEEDED: "something listens there, but it does not answer like a lightqwen server",
    grpc.StatusCode.UNAUTHENTICATED: "--token-file or $LIGHTQWEN_TOKEN gives a token",
    grpc.StatusCode.UNIMPLEMENTED: "that is no lightqwen server, or one of another version",
}


def run(arguments: argparse.Namespace, access: Access, screen: Screen, argv: Sequence[str]) -> int:
    """Measure as asked, print the table, write the files; returns the exit code.

    Args:
        argv: the command as it was typed, without the program's name; goes into the result.

    Raises:
        LoadError: it cannot be run, or a result cannot be written.
    """
    options = LoadOptions.of(arguments)
    if options.html is not None:
        require_matplotlib()
    model, server = _ask(access)
    workload = make_workload(options, vocab_size=model["vocab_size"], context_length=model["context_length"])
    settings = _settings(options, text=_wants_text(options, model))
    shares = divide(workload, options, settings)
    connections = sum(share.connections for share in shares)
    screen.say(f"{access.target}: {workload.description}; client processes: {len(shares)}, connections: {connections}")
    began = datetime.now().astimezone()
    outcome = run_fleet(access, shares, screen)
    result = Result(
        command=shlex.join(["lightqwen", *argv]),
        date=began.isoformat(timespec="seconds"),
        target=access.target,
        workload=workload.description,
        left_out=workload.left_out,
        options=_plain(options) | {"settings": settings},
        client=client_facts(len(shares), connections),
        server=server,
        model=model,
        interrupted=outcome.interrupted,
        planned=len(workload.requests),
        cpu_shares=outcome.cpu_shares,
        summary=summarise(outcome.records, options.goodput),
        records=outcome.records,
    )
    print(table(result), flush=True)
    if options.json is not None:
        _write(options.json, json.dumps(as_json(result, details=options.details), indent=1) + "\n")
    if options.html is not None:
        _write(options.html, page(result))
    if outcome.interrupted:
        return INTERRUPTED
    return 0 if result.summary.completed else NOTHING_COMPLETED


def divide(workload: Workload, options: LoadOptions, settings: dict[str, Any]) -> list[Share]:
    """Deal the requests out to processes, every n-th to each, and concurrency, connections and warm-up with them."""
    numbered = list(enumerate(workload.requests))
    streams = min(len(numbered), options.concurrency or len(numbered))
    count = min(options.processes or choose_processes(streams), streams)
    connections = max(count, min(options.connections or count, streams))
    warmup = [workload.requests[i % len(numbered)] for i in range(options.warmup)]
    return [
        Share(
            requests=numbered[i::count],
            # Parts of a whole: they differ by one at most, and none is 0.
            concurrency=None if options.concurrency is None else len(range(i, streams, count)),
            connections=len(range(i, connections, count)),
            warmup=warmup[i::count],
            settings=settings,
            seed=options.seed,
            timeout_s=options.timeout,
        )
        for i in range(count)
    ]


def _ask(access: Access) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the server says of its model and itself."""
    try:
        with access.client() as client:
            model = client.model(timeout=ASK_TIMEOUT_S)
            server = client.server_info(timeout=ASK_TIMEOUT_S)
    except LightqwenError as error:
        remedy = REMEDIES.get(error.code)
        raise LoadError(f"{access.target}: {error}" + (f" ({remedy})" if remedy else "")) from error
    return facts(model), facts(server)


def _wants_text(options: LoadOptions, model: dict[str, Any]) -> bool:
    if options.output is not None:
        return options.output == "text"
    return "CAPABILITY_TEXT_OUTPUT" in model["capabilities"]


def _settings(options: LoadOptions, *, text: bool) -> dict[str, Any]:
    """What every request has in common; what nobody asked for is left to the server."""
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    settings = {name: value for name, value in sampling.items() if value is not None}
    return settings | {"text": text, "token_ids": not text, "bypass_prefix_cache": not options.prefix_cache}


def _plain(options: LoadOptions) -> dict[str, Any]:
    """The options as JSON can hold them."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        name: str(value) if isinstance(value, Path | Range) or value == float("inf") else value
        for name, value in values.items()
    }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadError(f"cannot write {path}: {error.strerror}") from error
