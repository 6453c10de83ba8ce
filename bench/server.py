"""Benchmark through the server: `python -m bench.server --size 0.6B --json out.json`.

Starts `lightqwen serve` on random weights, sends requests by `lightqwen bench` from this machine, and ends the server:

- start: seconds from the start of the server's process until it says that it is ready;
- mixed256: the 256-request workload, all at once, twice;
- one_stream: 48 requests of 128 tokens in and 64 out, one after the other.

Temperature 0.6, end-of-sequence ignored, prefix cache bypassed, random weights unless --model names a checkpoint. What
stands behind `--` goes to `lightqwen serve`: `python -m bench.server --size 8B -- --tensor-parallel-size 2`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.provenance import json_file, provenance
from model.published import SIZES, write_config
from service.terminal import read_ready_line

LIGHTQWEN = (sys.executable, "-m", "service.cli")
SAMPLING = ("--temperature", "0.6", "--top-k", "0", "--top-p", "1")
LOADS = {
    "mixed256": (2, ("--workload", "mixed256", "--connections", "8")),
    "one_stream": (1, ("--num-requests", "48", "--concurrency", "1", "--input-len", "128", "--output-len", "64")),
}
"""How often, and what `lightqwen bench` is told besides."""

END_S = 30.0
INTERRUPTED = 128 + 2  # what a shell reports after Ctrl-C


class Failed(Exception):
    """The server or its client did not do what was wanted, and has told why."""


@contextmanager
def running(command: Sequence[str], end: signal.Signals, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command, which is told to `end` if it still runs when it is not wanted any more."""
    process = subprocess.Popen(command, text=True, **settings)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(end)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def serving(options: Sequence[str], environment: Mapping[str, str]) -> Iterator[tuple[dict[str, str], float]]:
    """Run a server; gives what its ready line tells, and the seconds until then.

    Raises:
        Failed: it ended before it was ready.
    """
    began = time.monotonic()
    command = [*LIGHTQWEN, "serve", *options]
    with running(command, signal.SIGTERM, stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None
        with server.stdout as told:
            facts = next((found for line in told if (found := read_ready_line(line)) is not None), None)
            if facts is None:
                raise Failed(f"the server ended with exit code {server.wait()} before it was ready")
            yield facts, time.monotonic() - began


def send(address: str, load: Sequence[str], file: Path) -> dict[str, Any]:
    """Return what `lightqwen bench` measured.

    Raises:
        Failed: not every request completed.
    """
    command = [*LIGHTQWEN, "bench", "--target", address, *SAMPLING, *load, "--json", str(file)]
    with running(command, signal.SIGINT, stdout=subprocess.DEVNULL) as client:
        code = client.wait()
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if code == 0 else {}
    if code or result["completed"] < result["planned"]:
        failed = f", failed requests: {result['failed']}" if result else ""
        raise Failed(f"`lightqwen bench {' '.join(load)}` ended with exit code {code}{failed}")
    return result


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, a line for each figure: the value, or those of each run."""
    if "start" in results:
        yield f"{'start, s':36}{results['start']:12.2f}"
    for name in LOADS:
        runs = results.get(name, [])
        figures = {
            "output tokens/s": [run["output_tokens_per_s"] for run in runs],
            "TTFT p50, ms": [run["ttft"]["p50"] for run in runs],
            "gap between chunks p99, ms": [run["itl"]["p99"] for run in runs],
        }
        for figure, values in figures.items():
            if values:
                yield f"{f'{name}: {figure}':36}" + "".join(f"{value:12,.2f}" for value in values)


def measure(arguments: argparse.Namespace, scratch: Path, results: dict[str, Any]) -> None:
    folder = arguments.model or write_config(arguments.size, scratch / arguments.size)
    source = ["--model", str(folder), "--load-format", "auto" if arguments.model else "random"]
    quiet = ["--port", "0", "--metrics-port", "-1", "--health-port", "-1", "--log-level", "warning"]
    kernels = {"TRITON_CACHE_DIR": str(scratch / "kernels")} if arguments.first_start else {}
    with serving([*source, *quiet, *arguments.serve], os.environ | kernels) as (facts, seconds):
        results["hardware"] = facts["device"]
        results["start"] = seconds
        for name, (times, load) in LOADS.items():
            for _ in range(times if name in arguments.only else 0):
                measured = send(facts["address"], load, scratch / "load.json")
                results.setdefault(name, []).append(measured)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.6B", help="shape of a published Qwen3 (%(default)s)")
    parser.add_argument("--model", help="folder of a checkpoint to use instead")
    names = ("start", *LOADS)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), help="which figures")
    parser.add_argument(
        "--first-start", action="store_true", help="with an empty cache of kernels, as on a new machine"
    )
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write everything here")
    parser.add_argument("serve", nargs="*", metavar="-- OPTION", help="options of `lightqwen serve`")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"size": None if arguments.model else arguments.size} | provenance("bench.server")
    code = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: neither leaves a server behind
    try:
        with tempfile.TemporaryDirectory() as scratch:
            measure(arguments, Path(scratch), results)
    except Failed as error:
        print(f"bench.server: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("bench.server: interrupted", file=sys.stderr)
        code = INTERRUPTED
    for line in lines(results):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
