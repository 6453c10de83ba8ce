"""What Prometheus sees. One object owns every metric and its registry; it is handed to whoever has something to tell.

Names, labels and buckets are documented in docs/metrics.md. Labels are bound once: an observation costs under 1 µs.

Each gateway of a server counts for itself, and gateway 0 tells the sum (`_Sum`). What is no gateway's own, such as the
engine's state and counters, all of them know, and gateway 0 tells it as it is.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable

import grpc
import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.registry import Collector

from service.model_service import version
from service.streams import Reply
from worker.client import EngineState
from worker.messages import EngineInfo, EngineStats, FinishReason

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
ITL_BUCKETS = (
    0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.4, 0.5, 0.75, 1, 2.5,
)  # fmt: skip
E2E_BUCKETS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
)  # fmt: skip
QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
LAG_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
TOKENS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 8448, 16384)  # 8448: a full step
CHUNK_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 1024)
CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)

STOP_STRING = "stop_string"
REJECTIONS = (
    "QUEUE_FULL", "QUEUE_TOKENS_FULL", "STREAMS_FULL", "DRAINING", "STARTING", "ENGINE_RESTARTING", "ENGINE_DEAD",
)  # fmt: skip
ENGINE_FACTS = (
    "device", "dtype", "attention_backend", "tensor_parallel_size", "max_model_len", "max_running", "prefix_caching",
)  # fmt: skip
STAGES = ("tokenizing", "queued", "prefill", "decode", "finished")


Series = tuple[str, dict[str, str], float]
"""Name, labels and value of one sample."""


class _Sum(Collector):
    """What all gateways of the server have counted, added up. Each of `others` is what one of them told last, which is
    never less than before."""

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own
        self._decode = msgspec.json.Decoder(dict[str, list[Series]]).decode
        self.others: dict[int, bytes] = {}

    def encoded(self) -> bytes:
        """What this gateway has counted, by family; some KB."""
        counted: dict[str, list[Series]] = {
            family.name: [(s.name, s.labels, s.value) for s in family.samples if not s.name.endswith("_created")]
            for family in self._own.collect()
        }
        return zlib.compress(msgspec.json.encode(counted), level=1)

    def describe(self) -> Iterable[Metric]:
        return self._own.collect()

    def collect(self) -> Iterable[Metric]:
        families = {family.name: family for family in self._own.collect()}
        for encoded in list(self.others.values()):
            for name, counted in self._decode(zlib.decompress(encoded)).items():
                _add(families[name], counted)
        return families.values()


def _add(family: Metric, counted: list[Series]) -> None:
    """Add to each sample; those that only the other gateway has come last, together as they are."""
    places = {(s.name, frozenset(s.labels.items())): place for place, s in enumerate(family.samples)}
    for name, labels, value in counted:
        place = places.get((name, frozenset(labels.items())))
        if place is None:
            family.add_sample(name, labels, value)
        else:
            mine = family.samples[place]
            family.samples[place] = mine._replace(value=mine.value + value)


class Metrics:
    """All metrics of one gateway, of one model; with what others have counted, all of a server.

    Args:
        model: value of the `model` label of every metric.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()  # what is told
        self._counted = CollectorRegistry()  # of that: what each gateway counts for itself
        self._sum = _Sum(self._counted)
        self._model = model
        self._epoch = 0
        self._last = EngineStats()
        self._ranks = 0
        self._restarts_counted = 0
        self._make_gateway_metrics()
        self._make_call_metrics()
        self._make_request_metrics()
        self._make_engine_metrics()
        self.registry.register(self._sum)

    # -- several gateways ----------------------------------------------------------------------------------------------

    def counted(self) -> bytes:
        """What this gateway has counted until now, for another one's `take`."""
        return self._sum.encoded()

    def take(self, gateway: int, counted: bytes) -> None:
        """What another gateway has counted, in the place of what it told before."""
        self._sum.others[gateway] = counted

    # -- the gateway itself --------------------------------------------------------------------------------------------

    def _make_gateway_metrics(self) -> None:
        build = Gauge(
            "lightqwen_build_info",
            "Always 1; the label tells the version.",
            ["model", "version"],
            registry=self.registry,
        )
        build.labels(self._model, version()).set(1)
        self._gauge("start_time_seconds", "When the gateway started, in Unix time.").set(time.time())

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _make_call_metrics(self) -> None:
        self._calls = self._labelled_counter("grpc_requests", "Calls by method and status code.", "method", "code")
        for code in grpc.StatusCode:  # a rate sees only what began at 0
            self._calls.labels(self._model, "Generate", code.name)
        self._call_seconds = Histogram(
            "lightqwen_grpc_seconds",
            "From a call's arrival until its status.",
            ["model", "method"],
            buckets=CALL_BUCKETS,
            registry=self._counted,
        )
        streams = Gauge(
            "lightqwen_streams_in_flight",
            "Generate calls that the engine works for.",
            ["model"],
            registry=self._counted,
        )
        self._streams = streams.labels(self._model)
        self._rejections = self._labelled_counter(
            "admission_rejections", "Requests refused before any work was done for them.", "reason"
        )
        for reason in REJECTIONS:
            self._rejections.labels(self._model, reason)
        self._cancelled = self._labelled_counter(
            "cancelled", "Requests that a client or its deadline ended, by where they were.", "stage"
        )
        for stage in STAGES:
            self._cancelled.labels(self._model, stage)
        self._cancel_to_free = self._histogram(
            "cancel_to_free_seconds",
            "From giving a request up until the engine had freed its KV blocks.",
            QUEUE_BUCKETS,
        )
        self._lag = self._histogram("event_loop_lag_seconds", "How late the gateway's event loop is.", LAG_BUCKETS)

    def call_ended(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        self._calls.labels(self._model, method, code.name).inc()
        self._call_seconds.labels(self._model, method).observe(seconds)

    def rejected(self, reason: str) -> None:
        self._rejections.labels(self._model, reason).inc()

    def cancelled(self, stage: str) -> None:
        self._cancelled.labels(self._model, stage).inc()

    def abort_confirmed(self, seconds: float) -> None:
        self._cancel_to_free.observe(seconds)

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def stream_opened(self) -> None:
        self._streams.inc()

    def stream_closed(self) -> None:
        self._streams.dec()

    # -- requests ------------------------------------------------------------------------------------------------------

    def _make_request_metrics(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that the engine began with.")
        self._cached_tokens = self._counter("cached_prompt_tokens", "Of prompt_tokens: found in the prefix cache.")
        self._finished = self._labelled_counter("requests_finished", "Requests that came to their end.", "reason")
        self._ttft = self._histogram("ttft_seconds", "From a call's arrival until its first token.", TTFT_BUCKETS)
        self._itl = self._histogram("itl_seconds", "Between tokens of one request.", ITL_BUCKETS)
        self._e2e = self._histogram("e2e_seconds", "From a call's arrival until its last token.", E2E_BUCKETS)
        self._queue = self._histogram("queue_seconds", "From a call's arrival until its first step.", QUEUE_BUCKETS)
        self._prefill = self._histogram("prefill_seconds", "From the first step until the first token.", TTFT_BUCKETS)
        self._decode = self._histogram("decode_seconds", "From the first token until the last.", E2E_BUCKETS)
        self._chunk = self._histogram("chunk_tokens", "Tokens of one message to a client.", CHUNK_BUCKETS)

    def request_started(self, prompt_tokens: int, reply: Reply) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(reply.cached_tokens)
        self._queue.observe(reply.scheduled - reply.arrived)

    def first_token(self, reply: Reply) -> None:
        self._chunk.observe(1)
        self._ttft.observe(reply.first_token - reply.arrived)
        self._prefill.observe(reply.first_token - reply.scheduled)

    def more_tokens(self, count: int, seconds: float) -> None:
        """`count` tokens came together, `seconds` after the ones before: each counts as an equal part of that time."""
        self._chunk.observe(count)
        for _ in range(count):
            self._itl.observe(seconds / count)

    def request_finished(self, reason: FinishReason | None, reply: Reply) -> None:
        """`reason` None: a stop string."""
        self._finished.labels(self._model, STOP_STRING if reason is None else reason.value).inc()
        self._e2e.observe(reply.last_token - reply.arrived)
        self._decode.observe(reply.last_token - reply.first_token)

    # -- engine --------------------------------------------------------------------------------------------------------

    def _make_engine_metrics(self) -> None:
        self._running = self._gauge("requests_running", "Requests that the engine computes.")
        self._waiting = self._gauge(
            "requests_waiting", "Requests that wait for their first step, or to be taken up again."
        )
        self._waiting_tokens = self._gauge("waiting_prompt_tokens", "Tokens of the waiting requests' prompts.")
        self._usage = self._gauge("kv_cache_usage_ratio", "Share of the KV blocks that running requests hold, 0 to 1.")
        self._blocks_used = self._gauge("kv_blocks_used", "KV blocks that running requests hold.")
        self._blocks_cached = self._gauge("kv_blocks_cached", "Free KV blocks whose content the prefix cache keeps.")
        self._blocks_total = self._gauge("kv_blocks_capacity", "KV blocks of each rank.")
        self._config_info = Gauge(
            "lightqwen_cache_config_info",
            "Always 1; the labels tell the cache's shape.",
            ["model", "block_size", "num_gpu_blocks"],
            registry=self.registry,
        )
        self._engine_info = Gauge(
            "lightqwen_engine_info",
            "Always 1; the labels tell what the engine runs with.",
            ["model", *ENGINE_FACTS],
            registry=self.registry,
        )
        self._ready = self._gauge("engine_ready", "1 while the engine takes requests.")
        self._restarts = self._engine_counter("engine_restarts", "Times that the ranks were lost and started again.")
        self._worker_up = Gauge(
            "lightqwen_worker_up", "1 while the rank takes part.", ["model", "rank"], registry=self.registry
        )
        self._preemptions = self._engine_counter("preemptions", "Requests put back into the queue to make room.")
        self._generated = self._engine_counter("generation_tokens", "Output tokens that the engine made.")
        self._computed = self._engine_counter(
            "computed_prompt_tokens", "Prompt tokens computed, recomputed ones included."
        )
        self._queried = self._engine_counter(
            "prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache."
        )
        self._hits = self._engine_counter("prefix_cache_hit_tokens", "Of the looked up: found.")
        # The leader tells one gateway what a step was, so these add up as well.
        self._iteration = self._histogram("iteration_tokens", "Tokens of one step.", TOKENS_BUCKETS)
        self._batch = self._histogram("batch_size", "Requests in one step.", BATCH_BUCKETS)
        steps = Histogram(
            "lightqwen_step_seconds",
            "Time of one step; phase is decode, or mixed when prefill is part of it.",
            ["model", "phase"],
            buckets=STEP_BUCKETS,
            registry=self._counted,
        )
        self._step_decode = steps.labels(self._model, "decode")
        self._step_mixed = steps.labels(self._model, "mixed")

    def watch_queue(self, queue: Callable[[], tuple[int, int]]) -> None:
        """Where the number of waiting requests, and of their prompt tokens, is asked for at each scrape."""
        self._waiting.set_function(lambda: queue()[0])
        self._waiting_tokens.set_function(lambda: queue()[1])

    def engine_state(self, state: EngineState, info: EngineInfo | None) -> None:
        if info is not None and info.tensor_parallel_size != self._ranks:
            self._ranks = info.tensor_parallel_size
        if state is EngineState.READY and info is not None:
            self._config_info.clear()
            self._config_info.labels(self._model, str(info.block_size), str(info.num_blocks)).set(1)
            self._engine_info.clear()
            self._engine_info.labels(self._model, *(str(getattr(info, fact)).lower() for fact in ENGINE_FACTS)).set(1)
        self._count_restarts(state, info)
        self._ready.set(state is EngineState.READY)
        for rank in range(self._ranks):
            self._worker_up.labels(self._model, str(rank)).set(state is EngineState.READY)

    def _count_restarts(self, state: EngineState, info: EngineInfo | None) -> None:
        """A loss counts at once. Further ones before the ranks are back are told by the epoch they come back with."""
        restarts = self._restarts_counted
        if state is EngineState.RESTARTING:
            restarts += 1
        elif state is EngineState.READY and info is not None:
            restarts = max(restarts, info.epoch - 1)
        self._restarts.inc(restarts - self._restarts_counted)
        self._restarts_counted = restarts

    def engine_stats(self, stats: EngineStats, epoch: int) -> None:
        """Take in a report. Its counters begin anew with each epoch; the metrics go on."""
        last = self._last if epoch == self._epoch else EngineStats()
        self._epoch, self._last = epoch, stats
        self._running.set(stats.running)
        self._blocks_used.set(stats.blocks_used)
        self._blocks_cached.set(stats.blocks_cached)
        self._blocks_total.set(stats.blocks_total)
        self._usage.set(stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0)
        self._preemptions.inc(stats.preemptions - last.preemptions)
        self._generated.inc(stats.generated_tokens - last.generated_tokens)
        self._computed.inc(stats.prompt_tokens - last.prompt_tokens)
        self._queried.inc(stats.prefix_queried_tokens - last.prefix_queried_tokens)
        self._hits.inc(stats.prefix_hit_tokens - last.prefix_hit_tokens)
        if stats.step_rows:
            self._iteration.observe(stats.step_tokens)
            self._batch.observe(stats.step_rows)
            step = self._step_decode if stats.step_tokens == stats.step_rows else self._step_mixed
            step.observe(stats.step_seconds)

    # -- making --------------------------------------------------------------------------------------------------------

    def _counter(self, name: str, text: str) -> Counter:
        return self._labelled_counter(name, text).labels(self._model)

    def _labelled_counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lightqwen_{name}", text, ["model", *labels], registry=self._counted)

    def _engine_counter(self, name: str, text: str) -> Counter:
        return Counter(f"lightqwen_{name}", text, ["model"], registry=self.registry).labels(self._model)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"lightqwen_{name}", text, ["model"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"lightqwen_{name}", text, ["model"], buckets=buckets, registry=self._counted)
        return metric.labels(self._model)
