"""What /metrics and /healthz say, above all after a load that is known."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from service.http import HttpEndpoint
from service.metrics import REJECTIONS, STAGES, Metrics
from tests.service.conftest import Serve, Served, collect, eventually, generate_request, ids
from worker.client import EngineState
from worker.messages import EngineInfo, EngineStats

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def fetch(url: str, accept: str = "text/plain") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_the_numbers_after_a_known_load(served: Served) -> None:
    served.leader.cached_tokens = 2
    requests = [generate_request(ids(*range(1, n + 4)), max_tokens=10 * (n + 1)) for n in range(4)]  # 3..6 -> 10..40
    await asyncio.gather(*(collect(served.generation.Generate(request)) for request in requests))
    with pytest.raises(grpc.aio.AioRpcError):
        await collect(served.generation.Generate(generate_request(ids(5000))))
    metric = served.metric
    await eventually(lambda: metric("generation_tokens_total") == 100)
    await eventually(lambda: metric("grpc_seconds_count", method="Generate") == 5)
    assert metric("grpc_requests_total", method="Generate", code="OK") == 4
    assert metric("grpc_requests_total", method="Generate", code="INVALID_ARGUMENT") == 1
    assert metric("requests_finished_total", reason="max_tokens") == 4
    assert metric("prompt_tokens_total") == 3 + 4 + 5 + 6
    assert metric("cached_prompt_tokens_total") == 8
    for name in ("ttft", "e2e", "queue", "prefill", "decode"):
        assert metric(f"{name}_seconds_count") == 4
    assert metric("itl_seconds_count") == 100 - 4
    assert metric("chunk_tokens_sum") == 100
    # Together, tokens come at the pace of the engine.
    assert metric("decode_seconds_sum") == pytest.approx(metric("itl_seconds_sum"), abs=0.01)
    assert metric("e2e_seconds_sum") == pytest.approx(
        metric("ttft_seconds_sum") + metric("decode_seconds_sum"), abs=0.01
    )
    assert metric("streams_in_flight") == 0
    assert metric("requests_waiting") == 0
    assert metric("waiting_prompt_tokens") == 0
    assert metric("kv_blocks_capacity") == 100
    assert metric("cache_config_info", block_size="16", num_gpu_blocks="100") == 1
    assert metric("worker_up", rank="0") == 1
    assert metric("engine_ready") == 1
    assert abs(metric("start_time_seconds") - time.time()) < 300
    assert metric("step_seconds_count", phase="decode") > 0
    assert metric("batch_size_count") == metric("iteration_tokens_count") > 0
    await eventually(lambda: metric("event_loop_lag_seconds_count") > 0)


async def test_waiting_requests_are_seen_before_the_engine_has_spoken(served: Served) -> None:
    served.leader.hold = True
    call = served.generation.Generate(generate_request(ids(1, 2, 3)))
    await eventually(lambda: len(served.leader.submits) == 1)
    assert (served.metric("requests_waiting"), served.metric("waiting_prompt_tokens")) == (1, 3)
    assert served.metric("streams_in_flight") == 1
    call.cancel()


async def test_both_formats_are_served_and_have_the_same_names(serve: Serve) -> None:
    async with serve(metrics_port=0) as served:
        await collect(served.generation.Generate(generate_request(ids(1))))
        url = served.facts["metrics"]
        status, text = await asyncio.to_thread(fetch, url)
        open_status, open_text = await asyncio.to_thread(fetch, url, OPENMETRICS)
        assert (status, open_status) == (200, 200)
        families = list(parse_text(text))
        open_families = list(parse_openmetrics(open_text))
        names = {
            sample.name for family in families for sample in family.samples if not sample.name.endswith("_created")
        }
        open_names = {s.name for family in open_families for s in family.samples if not s.name.endswith("_created")}
        assert names == open_names
        for family in families:
            assert family.documentation
            assert family.name.startswith("lightqwen_")
            assert ":" not in family.name
        for family in families:
            for sample in family.samples:
                assert sample.labels["model"] == "tiny"


async def test_every_metric_is_documented_and_every_documented_one_exists(served: Served, root: Path) -> None:
    documented = {
        line.split("`")[1] for line in (root / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")
    }
    registered = set()
    for family in served.gateway._metrics.registry.collect():
        registered.add(f"{family.name}_total" if family.type == "counter" else family.name)
    assert documented == registered


async def test_health_is_told_over_http(serve: Serve) -> None:
    async with serve(metrics_port=0) as served:
        base = str(served.facts["metrics"]).removesuffix("/metrics")
        assert await asyncio.to_thread(fetch, f"{base}/healthz") == (200, "ok\n")
        assert (await asyncio.to_thread(fetch, f"{base}/else"))[0] == 404
        served.gateway._engine.engine_dead("gone")
        assert await asyncio.to_thread(fetch, f"{base}/healthz") == (503, "the engine is dead\n")


async def test_a_stuck_event_loop_is_told_over_http(serve: Serve) -> None:
    async with serve(metrics_port=0) as served:
        base = str(served.facts["metrics"]).removesuffix("/metrics")
        seen = served.gateway._loop_seen
        served.gateway._loop_seen = seen - 3600
        answer = fetch(f"{base}/healthz")  # blocks this loop, as a bug would
        assert answer[0] == 503
        assert "event loop" in answer[1]


def test_a_client_that_says_nothing_keeps_nobody_else_waiting() -> None:
    import socket

    endpoint = HttpEndpoint("127.0.0.1", 0, CollectorRegistry(), lambda: None)
    try:
        with socket.create_connection(("127.0.0.1", endpoint.port)):
            began = time.monotonic()
            assert fetch(f"http://127.0.0.1:{endpoint.port}/healthz")[0] == 200
            assert time.monotonic() - began < 2
    finally:
        endpoint.close()


def test_a_server_that_starts_again_gets_its_port_back_at_once() -> None:
    """The end that closes a connection first keeps its port for a minute: here, the server after each scrape."""
    first = HttpEndpoint("127.0.0.1", 0, CollectorRegistry(), lambda: None)
    assert fetch(f"http://127.0.0.1:{first.port}/metrics")[0] == 200
    first.close()
    HttpEndpoint("127.0.0.1", first.port, CollectorRegistry(), lambda: None).close()


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_metrics_are_served_over_ipv6_too(host: str) -> None:
    endpoint = HttpEndpoint(host, 0, CollectorRegistry(), lambda: None)
    try:
        assert fetch(f"http://[::1]:{endpoint.port}/healthz") == (200, "ok\n")
    finally:
        endpoint.close()


def test_counters_go_on_when_the_engine_starts_again() -> None:
    metrics = Metrics("m")

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"lightqwen_{name}", {"model": "m"})

    metrics.engine_stats(EngineStats(generated_tokens=10, preemptions=1, prefix_hit_tokens=4), epoch=1)
    metrics.engine_stats(EngineStats(generated_tokens=15, preemptions=1, prefix_hit_tokens=4), epoch=1)
    assert value("generation_tokens_total") == 15
    metrics.engine_stats(EngineStats(generated_tokens=3, preemptions=2), epoch=2)
    metrics.engine_stats(EngineStats(generated_tokens=4, preemptions=2, prefix_hit_tokens=1), epoch=2)
    assert (value("generation_tokens_total"), value("preemptions_total")) == (19, 3)
    assert value("prefix_cache_hit_tokens_total") == 5


def test_what_alerts_count_begins_at_zero() -> None:
    metrics = Metrics("m")

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"lightqwen_{name}", {"model": "m", **labels})

    for code in grpc.StatusCode:
        assert value("grpc_requests_total", method="Generate", code=code.name) == 0
    for reason in REJECTIONS:
        assert value("admission_rejections_total", reason=reason) == 0
    for stage in STAGES:
        assert value("cancelled_total", stage=stage) == 0
    metrics.rejected("QUEUE_FULL")
    assert value("admission_rejections_total", reason="QUEUE_FULL") == 1


def test_each_loss_of_the_ranks_is_counted_once() -> None:
    metrics = Metrics("m")
    facts = EngineInfo(
        epoch=1,
        model_path="/m",
        vocab_size=8,
        max_model_len=64,
        block_size=16,
        num_blocks=10,
        max_running=4,
        max_batched_tokens=64,
        tensor_parallel_size=2,
        device="cpu",
        dtype="float32",
        attention_backend="torch",
        prefix_caching=True,
    )

    def restarts() -> float | None:
        return metrics.registry.get_sample_value("lightqwen_engine_restarts_total", {"model": "m"})

    def ready() -> float | None:
        return metrics.registry.get_sample_value("lightqwen_engine_ready", {"model": "m"})

    assert (ready(), restarts()) == (0, 0)
    metrics.engine_state(EngineState.READY, facts)
    assert (ready(), restarts()) == (1, 0)
    metrics.engine_state(EngineState.RESTARTING, facts)
    assert (ready(), restarts()) == (0, 1)
    metrics.engine_state(EngineState.READY, msgspec.structs.replace(facts, epoch=2))
    assert (ready(), restarts()) == (1, 1)
    metrics.engine_state(EngineState.RESTARTING, facts)
    metrics.engine_state(EngineState.READY, msgspec.structs.replace(facts, epoch=4))  # lost again on the way
    assert (ready(), restarts()) == (1, 3)


async def test_ranks_are_down_while_the_engine_is(served: Served) -> None:
    served.gateway._engine.engine_lost(1, "x")
    assert served.gateway._engine.state is EngineState.RESTARTING
    assert served.metric("worker_up", rank="0") == 0
    assert served.metric("engine_ready") == 0
