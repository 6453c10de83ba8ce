"""What `lightqwen bench` can be asked for. Standard library only: the command line is built without the rest."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.load.errors import LoadError

DESCRIPTION = """\
Drive a running server over gRPC, and report latencies and throughput with the definitions of `vllm bench serve`.

What is sent: random token ids of the lengths you name, or the lines of a trace. When: all at once, at a rate, with a
fixed number in flight, or at the trace's own times. A first run against a server on this machine:

  lightqwen bench --num-requests 200 --concurrency 16 --input-len 128 --output-len 64
"""

EPILOG = """\
more examples:
  Poisson arrivals, 8 a second, lengths drawn from ranges, service levels, and a page with the distributions:
    lightqwen bench --request-rate 8 --input-len 100:1024 --output-len 50:300 \\
        --goodput ttft:500 tpot:40 --json result.json --html result.html
  the same rate, evenly spaced:
    lightqwen bench --request-rate 8 --burstiness inf
  a trace in Mooncake's format (its times are milliseconds), at double speed:
    lightqwen bench --trace mooncake.jsonl --time-scale 0.0005 --hash-block-size 512

figures (ms; percentiles over completed requests, over all gaps for ITL):
  TTFT  from the call until the first output arrives
  TPOT  (last arrival - first arrival) / (output tokens - 1), of requests with more than one
  ITL   between two arrivals of one stream; an arrival may bring several tokens
  E2EL  from the call until the last output arrives

The exit code is 0 if any request completed, 1 if none did, 130 after Ctrl-C (what was measured is still reported).
docs/benchmarking.md teaches the rest: trace format, choosing a load, reading the figures, the client's own limits.
"""

DEFAULT_REQUESTS = 100
SERVICE_LEVELS = ("ttft", "tpot", "e2el")


class Range(NamedTuple):
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


DEFAULT_LENGTH = Range(128, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options, checked one by one and together. None: not limited, not wanted, or left to the server."""

    workload: str
    trace: Path | None
    num_requests: int | None
    """None: all of the trace."""
    input_len: Range
    output_len: Range
    time_scale: float
    hash_block_size: int | None
    skip_long: bool
    request_rate: float | None
    burstiness: float
    concurrency: int | None
    warmup: int
    seed: int
    processes: int | None
    connections: int | None
    timeout: float | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    ignore_eos: bool | None
    """None: only where the input is random."""
    prefix_cache: bool
    output: str | None
    goodput: dict[str, float]
    json: Path | None
    html: Path | None
    details: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> LoadOptions:
        """Take the parsed options and fill in what was left open.

        Raises:
            LoadError: some of them do not go together, or a result could not be written where it should be.
        """
        _check(arguments)
        values = {name: getattr(arguments, name) for name in cls.__dataclass_fields__}
        defaults = {
            "num_requests": DEFAULT_REQUESTS if arguments.trace is None else None,
            "input_len": DEFAULT_LENGTH,
            "output_len": DEFAULT_LENGTH,
            "time_scale": 1.0,
            "burstiness": 1.0,
            "prefix_cache": arguments.trace is not None,
        }
        values |= {name: default for name, default in defaults.items() if values[name] is None}
        values["goodput"] = dict(values["goodput"])
        return cls(**values)


def _check(arguments: argparse.Namespace) -> None:
    def refuse(why: str, *names: str) -> None:
        for name in names:
            if getattr(arguments, name) not in (None, False):
                raise LoadError(f"--{name.replace('_', '-')} {why}")

    if arguments.workload != "random":
        why = f"does not go with --workload {arguments.workload}, whose requests are fixed"
        refuse(why, "trace", "num_requests", "input_len", "output_len")
    if arguments.trace is None:
        refuse("needs --trace", "time_scale", "hash_block_size", "skip_long")
    else:
        refuse("is for random input; the lines of --trace say it", "input_len")
    if arguments.request_rate is None:
        refuse("needs --request-rate", "burstiness")
    else:
        refuse("scales the trace's timestamps, which --request-rate replaces", "time_scale")
    if arguments.json is None:
        refuse("needs --json FILE: that is where they go", "details")
    for path in filter(None, (arguments.json, arguments.html)):
        if not path.parent.is_dir():
            raise LoadError(f"cannot write {path}: there is no folder {path.parent}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add everything but how the server is reached."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    what = parser.add_argument_group("what is sent")
    what.add_argument(
        "--input-len", type=_range, metavar="N|A:B", help="prompt tokens, drawn between A and B (default: 128)"
    )
    what.add_argument(
        "--output-len",
        type=_range,
        metavar="N|A:B",
        help="output tokens; also those of trace lines that name none (default: 128)",
    )
    what.add_argument(
        "--num-requests", type=_positive, metavar="N", help="how many (default: 100; of a trace: all of it)"
    )
    what.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="send the lines of this JSONL file: timestamp, prompt or input_length",
    )
    what.add_argument(
        "--time-scale",
        type=_positive_float,
        metavar="X",
        help="multiply the trace's timestamps by this to get seconds (default: 1; milliseconds: 0.001)",
    )
    what.add_argument(
        "--hash-block-size",
        type=_positive,
        metavar="N",
        help="equal hash_ids of a trace become equal blocks of N prompt tokens (Mooncake: 512, Qwen-Bailian: 16); "
        "default: prompts share nothing",
    )
    what.add_argument(
        "--skip-long", action="store_true", help="leave out trace lines that do not fit the context (default: refuse)"
    )
    what.add_argument(
        "--workload",
        choices=("random", "mixed256"),
        default="random",
        help="mixed256: 256 fixed requests of 100 to 1,024 tokens that published figures use (default: %(default)s)",
    )

    when = parser.add_argument_group("when (default: a trace's timestamps; else all at once)")
    when.add_argument(
        "--request-rate", type=_positive_or_inf, metavar="R", help="requests a second on average; inf: all at once"
    )
    when.add_argument(
        "--burstiness",
        type=_positive_or_inf,
        metavar="B",
        help="shape of the gamma distribution between arrivals: 1 is Poisson, less is burstier, inf is evenly spaced "
        "(default: 1)",
    )
    when.add_argument("--concurrency", type=_positive, metavar="N", help="never more than so many in flight")
    when.add_argument(
        "--warmup",
        type=_count,
        default=8,
        metavar="N",
        help="send so many requests before, uncounted (default: %(default)s)",
    )

    how = parser.add_argument_group("how each request is made (unset: the server's defaults)")
    how.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    how.add_argument("--top-p", type=float, metavar="P", help="share of probability to choose from")
    how.add_argument("--top-k", type=int, metavar="K", help="number of tokens to choose from; 0: all")
    how.add_argument("--min-p", type=float, metavar="P", help="least probability, relative to the likeliest token's")
    how.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="go on after end-of-sequence tokens (default: yes for random input, no for a trace's own prompts)",
    )
    how.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        help="let prompts use the server's prefix cache (default: yes for a trace, no for random input)",
    )
    how.add_argument(
        "--output", choices=("text", "tokens"), help="what to ask for (default: text where the server has a tokenizer)"
    )
    how.add_argument("--timeout", type=_positive_float, metavar="S", help="deadline of each request (default: none)")
    how.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="of lengths, ids, arrivals and sampling (default: 0)"
    )
    how.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="client processes (default: one for each 32 streams, as many as there are cores at most)",
    )
    how.add_argument(
        "--connections",
        type=_positive,
        metavar="N",
        help="connections of all processes together: what the gateways of a server are given (default, and at least: "
        "one for each process)",
    )

    results = parser.add_argument_group("results (a table goes to standard output)")
    results.add_argument(
        "--goodput",
        nargs="+",
        type=_service_level,
        default=[],
        metavar="NAME:MS",
        help=f"count requests that keep all of these limits ({', '.join(SERVICE_LEVELS)})",
    )
    results.add_argument("--json", type=Path, metavar="FILE", help="write the result here, with what made it")
    results.add_argument("--details", action="store_true", help="put every request's times into it")
    results.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with distributions and throughput over time"
    )


def _range(text: str) -> Range:
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor a range A:B")
    low, high = int(parts[0]), int(parts[-1])
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and something not smaller")
    return Range(low, high)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _positive_or_inf(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _positive_float(text: str) -> float:
    value = _positive_or_inf(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite")
    return value


def _service_level(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in SERVICE_LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(f'{n}:MS' for n in SERVICE_LEVELS)}")
    return name, _positive_float(limit)
