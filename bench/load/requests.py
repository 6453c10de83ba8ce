"""What is sent, and when: requests made of random ids, of a fixed workload, or of a trace."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bench.load.errors import LoadError
from bench.load.options import LoadOptions, Range
from bench.load.trace import TraceLine, read_trace
from bench.workloads import VOCABULARY, mixed_256
from lightqwen.client import Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One request, ready to be sent."""

    origin: str
    """Where it comes from, for people."""
    prompt: str | Chat | array[int]
    max_tokens: int
    ignore_eos: bool
    timestamp: float | None = None
    """The trace's own, in its unit of time."""
    due_s: float = 0.0
    """When it should be sent, from the beginning of the run."""

    @property
    def prompt_tokens(self) -> int | None:
        """None: only the server can tell."""
        return len(self.prompt) if isinstance(self.prompt, array) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """All requests in the order of their sending, and a description of them."""

    requests: list[LoadRequest]
    description: str
    left_out: int
    """Requests of the trace that do not fit the context."""


def make_workload(options: LoadOptions, *, vocab_size: int, context_length: int) -> Workload:
    """Make what these options ask for; the same seed makes the same.

    Raises:
        LoadError: a trace cannot be used as asked, or a request does not fit the model's context.
    """
    rng = np.random.default_rng(options.seed)
    requests = list(_make_requests(options, rng, min(vocab_size, VOCABULARY), vocab_size))
    fitting = [request for request in requests if _fits(request, context_length)]
    left_out = len(requests) - len(fitting)
    if left_out and not options.skip_long:
        raise _too_long(options, requests, context_length, left_out)
    if not fitting:
        raise LoadError(f"no request of {options.trace} fits the model's context of {context_length} tokens")
    scheduled, when = _schedule(options, fitting, rng)
    description = f"{len(scheduled)} requests, {_what(options)}; {when}"
    return Workload(requests=scheduled, description=description, left_out=left_out)


def arrivals(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """When requests come, in seconds from the first: gamma-distributed gaps of 1 / `rate` on average.

    `burstiness` is the distribution's shape: 1 makes a Poisson process, infinity equal gaps (as `vllm bench serve` has
    it, but for its last step, which stretches the draw to last exactly `count / rate`).
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.full(count - 1, 1 / rate)
    else:
        gaps = rng.gamma(burstiness, 1 / (rate * burstiness), count - 1)
    times: list[float] = np.concatenate([[0.0], np.cumsum(gaps)]).tolist()
    return times


def _make_requests(
    options: LoadOptions, rng: np.random.Generator, ordinary_ids: int, vocab_size: int
) -> Iterator[LoadRequest]:
    if options.workload == "mixed256":
        for number, job in enumerate(mixed_256()):
            prompt = array("I", (token % vocab_size for token in job.prompt_ids))
            yield _synthetic(options, f"request {number}", prompt, job.max_tokens)
    elif options.trace is not None:
        for line in read_trace(options.trace, options.num_requests):
            yield _of_trace(options, line, rng, ordinary_ids)
    else:
        for number in range(options.num_requests or 0):
            prompt = _random_ids(rng, _draw(options.input_len, rng), ordinary_ids)
            yield _synthetic(options, f"request {number}", prompt, _draw(options.output_len, rng))


def _synthetic(options: LoadOptions, origin: str, prompt: array[int], max_tokens: int) -> LoadRequest:
    """A prompt that means nothing: where the model would end is chance, so it is told where."""
    ignore_eos = True if options.ignore_eos is None else options.ignore_eos
    return LoadRequest(origin=origin, prompt=prompt, max_tokens=max_tokens, ignore_eos=ignore_eos)


def _of_trace(options: LoadOptions, line: TraceLine, rng: np.random.Generator, ordinary_ids: int) -> LoadRequest:
    origin = f"line {line.number} of {options.trace}"
    max_tokens = line.output_length or _draw(options.output_len, rng)
    if line.prompt is not None:
        request = LoadRequest(
            origin=origin, prompt=line.prompt, max_tokens=max_tokens, ignore_eos=options.ignore_eos or False
        )
    else:
        request = _synthetic(options, origin, _trace_ids(options, line, rng, ordinary_ids), max_tokens)
    return replace(request, timestamp=line.timestamp)


def _trace_ids(options: LoadOptions, line: TraceLine, rng: np.random.Generator, ordinary_ids: int) -> array[int]:
    """Ids of the line's length; equal hash ids make equal blocks, if the options say how long a block is."""
    length = line.input_length or 0
    ids: array[int] = array("I")
    if options.hash_block_size is not None:
        for hash_id in line.hash_ids[: -(-length // options.hash_block_size)]:
            block = np.random.default_rng([options.seed, hash_id])
            ids.extend(_random_ids(block, options.hash_block_size, ordinary_ids))
    ids.extend(_random_ids(rng, max(0, length - len(ids)), ordinary_ids))
    return ids[:length]


def _random_ids(rng: np.random.Generator, count: int, ordinary_ids: int) -> array[int]:
    ids: array[int] = array("I")
    ids.frombytes(rng.integers(0, ordinary_ids, count, dtype=np.uint32).tobytes())
    return ids


def _draw(lengths: Range, rng: np.random.Generator) -> int:
    return int(rng.integers(lengths.low, lengths.high, endpoint=True))


def _fits(request: LoadRequest, context_length: int) -> bool:
    return request.prompt_tokens is None or request.prompt_tokens + request.max_tokens <= context_length


def _too_long(options: LoadOptions, requests: list[LoadRequest], context_length: int, count: int) -> LoadError:
    first = next(request for request in requests if not _fits(request, context_length))
    remedy = "leave such lines out with --skip-long" if options.trace else "shorten --input-len or --output-len"
    if options.workload != "random":
        remedy = "choose another workload"
    return LoadError(
        f"{first.origin} is {first.prompt_tokens} tokens and wants {first.max_tokens} more, but the model's context is "
        f"{context_length} tokens ({count} of {len(requests)} requests are too long): {remedy}, or serve with a larger "
        "--max-model-len"
    )


def _schedule(
    options: LoadOptions, requests: list[LoadRequest], rng: np.random.Generator
) -> tuple[list[LoadRequest], str]:
    """Say when each is due. A rate goes before the trace's timestamps; without either, all are due at once."""
    if options.request_rate is not None and not math.isinf(options.request_rate):
        shapes = {1.0: "Poisson", math.inf: "evenly spaced"}
        shape = shapes.get(options.burstiness, f"burstiness {options.burstiness:g}")
        due = arrivals(len(requests), options.request_rate, options.burstiness, rng)
        when = f"{options.request_rate:g} a second, {shape}"
    elif options.request_rate is None and requests[0].timestamp is not None:
        first = requests[0].timestamp
        due = [((request.timestamp or 0.0) - first) * options.time_scale for request in requests]
        when = f"at the trace's times, {due[-1]:.1f} s in all"
    else:
        if options.time_scale != 1.0:
            raise LoadError(f"--time-scale has nothing to scale: {options.trace} has no timestamps")
        due = [0.0] * len(requests)
        when = "all at once"
    if options.concurrency is not None:
        when = f"{options.concurrency} in flight" + ("" if due[-1] == 0 else f" at most, {when}")
    return [replace(request, due_s=due_s) for request, due_s in zip(requests, due, strict=True)], when


def _what(options: LoadOptions) -> str:
    if options.workload != "random":
        return options.workload
    if options.trace is not None:
        return f"from {options.trace}"
    return f"{options.input_len} tokens in, {options.output_len} out"
