"""From the first bind to the last stream: readiness, health, restarts of the engine, draining, and the exit."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lightqwen.v1 import generation_pb2_grpc
from service.config import ServeConfig
from service.server import SERVICE_NAMES, run_gateway
from tests.service.conftest import Serve, Served, collect, eventually, first_up, generate_request, ids
from tests.service.fake_leader import FakeLeader, count_up, private_endpoint
from tests.service.test_errors import failure, failure_by_reading
from worker.control import Drain, EngineDead, EngineLost, Fatal, Stop, SupervisorEnd, Up

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def check(channel: grpc.aio.Channel, service: str = "") -> int:
    return int((await health_of(channel).Check(health_pb2.HealthCheckRequest(service=service))).status)


async def test_the_port_is_open_and_not_serving_until_the_engine_is_ready(serve: Serve, leader: FakeLeader) -> None:
    leader.die()
    async with serve(wait=False) as served:
        assert await check(served.channel) == NOT_SERVING
        failed = await failure(served.generation.Generate(generate_request(ids(1))))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "STARTING")
        failed = await failure(served.model.GetServerInfo({}))
        assert failed.info.reason == "STARTING"
        with FakeLeader(leader.endpoint):
            await eventually(lambda: first_up(served.supervisor) is not None)
            await collect(served.generation.Generate(generate_request(ids(1))))
            for name in ("", *SERVICE_NAMES):
                assert await check(served.channel, name) == SERVING


async def test_the_ready_line_has_its_facts(served: Served) -> None:
    assert served.facts["model"] == "tiny"
    assert served.facts["kv_blocks"] == 100
    assert served.facts["tensor_parallel_size"] == 1
    assert served.facts["address"] == f"127.0.0.1:{served.gateway.port}"


async def test_health_is_watched_live_and_streams_outlive_the_engine(served: Served, leader: FakeLeader) -> None:
    """The engine dies in the middle; another comes; the client sees neither a gap nor a repetition."""
    leader.step_s = 0.01
    watch = health_of(served.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    calls = [served.generation.Generate(generate_request(ids(n), max_tokens=60)) for n in (1, 2, 3)]
    results = [asyncio.create_task(collect(call)) for call in calls]
    await eventually(lambda: leader.generated > 30)
    leader.die()
    served.supervisor.send(EngineLost(1, "rank 0 died"))
    assert (await watch.read()).status == NOT_SERVING
    failed = await failure(served.generation.Generate(generate_request(ids(1))))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
    with FakeLeader(leader.endpoint, epoch=2, step_s=0.001) as second:
        for n, result in zip((1, 2, 3), await asyncio.gather(*results), strict=True):
            assert result.ids == [count_up([n], i) for i in range(60)]
            assert result.finished.usage.output_tokens == 60
        assert (await watch.read()).status == SERVING
        assert all(submit.output for submit in second.submits)
        assert served.metric("generation_tokens_total") == 180
    watch.cancel()


async def test_a_request_under_which_the_engine_dies_again_and_again_is_failed(
    served: Served, leader: FakeLeader
) -> None:
    leader.hold = True
    call = served.generation.Generate(generate_request(ids(1)))
    await eventually(lambda: len(leader.submits) == 1)
    failing = asyncio.create_task(failure(call))
    for epoch in (2, 3, 4):
        leader.die()
        served.supervisor.send(EngineLost(epoch - 1, "again"))
        leader = FakeLeader(leader.endpoint, epoch=epoch, hold=True).__enter__()
        if epoch < 4:
            await eventually(lambda leader=leader: len(leader.submits) == 1)  # type: ignore[misc]
    failed = await failing
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.INTERNAL, "WORKER_FAILED")
    leader.die()


async def test_a_dead_engine_fails_its_streams_and_ends_the_process(served: Served) -> None:
    served.leader.step_s = 0.02
    call = served.generation.Generate(generate_request(ids(1), max_tokens=200))
    failing = asyncio.create_task(failure(call))
    await eventually(lambda: bool(served.leader.running))
    served.supervisor.send(EngineDead("too many restarts"))
    failed = await failing
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
    assert await asyncio.wait_for(served.running, 5) == 1


async def test_reflection_tells_the_contract_unless_it_is_off(served: Served, serve: Serve) -> None:
    async def services(channel: grpc.aio.Channel) -> set[str]:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]))
        async for response in call:
            return {service.name for service in response.list_services_response.service}
        return set()

    assert {*SERVICE_NAMES, "grpc.health.v1.Health"} <= await services(served.channel)
    async with serve(reflection=False) as silent:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(silent.channel)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_draining_withdraws_then_refuses_then_waits_for_what_runs(serve: Serve, leader: FakeLeader) -> None:
    leader.step_s = 0.01
    async with serve(withdrawal_s=1.0) as served:
        running = [
            asyncio.create_task(collect(served.generation.Generate(generate_request(ids(n), max_tokens=200))))
            for n in range(20)
        ]
        await eventually(lambda: len(leader.running) == 20)
        watch = health_of(served.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        served.gateway.end_gracefully()
        assert (await watch.read()).status == NOT_SERVING
        late = await collect(served.generation.Generate(generate_request(ids(7), max_tokens=2)))
        assert len(late.ids) == 2
        await eventually(lambda: served.gateway._admission.draining)
        failed = await failure(served.generation.Generate(generate_request(ids(1))))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        for n, got in enumerate(await asyncio.gather(*running)):
            assert got.ids == [count_up([n], i) for i in range(200)]
        assert await asyncio.wait_for(served.running, 5) == 0
        await eventually(lambda: leader.goodbyes == 1)


async def test_what_outlives_the_drain_timeout_is_cut_off(serve: Serve, leader: FakeLeader) -> None:
    leader.step_s = 0.5
    async with serve(drain_timeout_s=0.2) as served:
        call = served.generation.Generate(generate_request(ids(1), max_tokens=200))
        await call.read()
        failing = asyncio.create_task(failure_by_reading(call))
        served.gateway.end_gracefully()
        began = time.monotonic()
        assert await asyncio.wait_for(served.running, 5) == 0
        assert time.monotonic() - began < 1
        failed = await failing
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert failed.has_retry


# ---- as a process ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(config: ServeConfig, leader: FakeLeader) -> Iterator[tuple[SpawnProcess, SupervisorEnd, Connection]]:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=run_gateway, args=(config, leader.endpoint, theirs))
    child.start()
    theirs.close()
    try:
        yield child, SupervisorEnd(ours), ours
    finally:
        child.kill()
        child.join()
        ours.close()


async def hear(supervisor: SupervisorEnd) -> Any:
    """That it is up, or why not."""
    async with asyncio.timeout(20):
        while True:
            news = [message for message in supervisor.receive() if isinstance(message, Up | Fatal)]
            if news:
                return news[0]
            await asyncio.sleep(0.02)


async def ended(child: SpawnProcess) -> int | None:
    await asyncio.to_thread(child.join, 10)
    return child.exitcode


def config_for(checkpoint: Path, **options: Any) -> ServeConfig:
    return ServeConfig(**({"model": str(checkpoint), "port": 0, "metrics_port": 0} | options))


async def test_the_process_drains_and_exits_with_0(leader: FakeLeader, checkpoint: Path) -> None:
    leader.step_s = 0.01
    with process(config_for(checkpoint), leader) as (child, supervisor, _):
        up = await hear(supervisor)
        assert isinstance(up, Up)
        assert str(up.facts["metrics"]).endswith("/metrics")
        async with grpc.aio.insecure_channel(str(up.facts["address"])) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            running = asyncio.create_task(collect(stub.Generate(generate_request(ids(1), max_tokens=80))))
            await eventually(lambda: bool(leader.running))
            supervisor.send(Drain())
            assert len((await running).ids) == 80
        assert await ended(child) == 0


async def test_the_process_stops_at_once(leader: FakeLeader, checkpoint: Path) -> None:
    leader.step_s = 0.5
    with process(config_for(checkpoint), leader) as (child, supervisor, _):
        up = await hear(supervisor)
        async with grpc.aio.insecure_channel(str(up.facts["address"])) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate(generate_request(ids(1), max_tokens=200))
            await call.read()
            supervisor.send(Drain())
            await asyncio.sleep(0.2)
            assert child.is_alive()
            began = time.monotonic()
            supervisor.send(Stop())
            assert await ended(child) == 0
            assert time.monotonic() - began < 2


async def test_without_its_supervisor_it_ends_at_once(leader: FakeLeader, checkpoint: Path) -> None:
    with process(config_for(checkpoint), leader) as (child, supervisor, pipe):
        await hear(supervisor)
        pipe.close()
        assert await ended(child) == 1


async def test_a_port_in_use_is_one_readable_line(leader: FakeLeader, checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option, flag in (("port", "--port"), ("metrics_port", "--metrics-port")):
            with process(config_for(checkpoint, **{option: port}), leader) as (child, supervisor, _):
                assert await hear(supervisor) == Fatal(
                    f"port {port} on 127.0.0.1 is in use; choose another with {flag}"
                )
                assert await ended(child) == 2


async def test_an_address_that_is_not_ours_is_one_readable_line(leader: FakeLeader, checkpoint: Path) -> None:
    with process(config_for(checkpoint, host="192.0.2.1"), leader) as (child, supervisor, _):
        fatal = await hear(supervisor)
        assert isinstance(fatal, Fatal)
        assert fatal.reason == ("cannot listen on 192.0.2.1:0: Cannot assign requested address; see --host and --port")
        assert await ended(child) == 2


async def test_a_folder_that_cannot_be_served_is_one_readable_line(leader: FakeLeader, tmp_path: Path) -> None:
    with process(config_for(tmp_path), leader) as (child, supervisor, _):
        fatal = await hear(supervisor)
        assert isinstance(fatal, Fatal)
        assert "has no config.json" in fatal.reason
        assert await ended(child) == 2


async def test_two_servers_do_not_share_a_port_by_accident(served: Served, serve: Serve) -> None:
    with pytest.raises(Exception, match="is in use"):
        async with serve(wait=False, port=served.gateway.port):
            pass


def test_endpoints_are_private() -> None:
    assert private_endpoint().address != private_endpoint().address
