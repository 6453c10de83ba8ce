"""One gateway of two, whose other one is the test: what it asks, answers and tells, and what it makes of silence."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import socket
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from lightqwen.v1 import admin_pb2, model_pb2
from service import gateways
from service.admission import Admission
from service.gateways import Gateways
from service.metrics import Metrics
from service.ports import bind, hold_port
from service.streams import OpenCalls
from tests.service.conftest import Serve, collect, eventually, generate_request, ids
from tests.service.test_errors import failure, failure_by_reading
from tests.service.test_metrics import fetch
from worker.config import ConfigError
from worker.control import (
    MAX_NAMED_CALLS,
    MAX_OFFER_BYTES,
    AbortCalls,
    Answer,
    Ask,
    ChildEnd,
    CloseDoor,
    Drain,
    Figures,
    Look,
    Standing,
    SupervisorEnd,
)
from worker.messages import EngineStats
from worker.vitals import STALLED_S


class Other:
    """Gateway 1, and the supervisor between the two."""

    def __init__(self, supervisor: SupervisorEnd) -> None:
        self._supervisor = supervisor
        self._tickets = itertools.count(100)

    async def hear(self, kind: type[Any]) -> Any:
        """The next message of this kind."""
        async with asyncio.timeout(5):
            while True:
                found = [message for message in self._supervisor.receive() if isinstance(message, kind)]
                if found:
                    assert len(found) == 1
                    return found[0]
                await asyncio.sleep(0.005)

    async def ask(self, question: Look | CloseDoor | AbortCalls) -> Answer:
        asked = Ask(1, next(self._tickets), question)
        self._supervisor.offer(asked)
        answer: Answer = await self.hear(Answer)
        assert (answer.asker, answer.ticket) == (1, asked.ticket)
        return answer

    async def answer(self, standing: Standing, aborted: list[str] | None = None) -> Ask:
        """Answer the next question, and tell what it was."""
        asked: Ask = await self.hear(Ask)
        self._supervisor.offer(Answer(asked.asker, asked.ticket, standing, aborted or []))
        return asked

    def tell(self, standing: Standing, metrics: Metrics) -> None:
        self._supervisor.offer(Figures(1, standing, metrics.counted()))


async def test_the_load_is_that_of_all(serve: Serve) -> None:
    async with serve(gateways=2) as served:
        other = Other(served.supervisor)
        served.leader.hold = True
        call = served.generation.Generate(generate_request(ids(1, 2, 3)))
        await eventually(lambda: len(served.leader.submits) == 1)
        asking = asyncio.ensure_future(served.admin.GetLoad(admin_pb2.GetLoadRequest()))
        assert (await other.answer(Standing(5, 4, 300))).question == Look()
        load = (await asking).load
        assert (load.streams, load.waiting, load.waiting_prompt_tokens) == (6, 5, 303)
        assert (await other.ask(Look())).standing == Standing(1, 1, 3)
        call.cancel()


async def test_an_abort_reaches_all_and_tells_what_was_found(serve: Serve) -> None:
    async with serve(gateways=2) as served:
        other = Other(served.supervisor)
        served.leader.step_s = 0.02
        call = served.generation.Generate(generate_request(ids(1), max_tokens=200, request_id="here"))
        await call.read()
        request = admin_pb2.AbortRequest(request_ids=["there", "nowhere"])
        asking = asyncio.ensure_future(served.admin.Abort(request))
        asked = await other.answer(Standing(), ["there"])
        assert asked.question == AbortCalls(["there", "nowhere"], everything=False)
        assert [(r.request_id, r.outcome) for r in (await asking).results] == [
            ("there", admin_pb2.ABORT_OUTCOME_ABORTED),
            ("nowhere", admin_pb2.ABORT_OUTCOME_NOT_FOUND),
        ]
        assert (await other.ask(AbortCalls(["elsewhere"], everything=False))).aborted == []
        assert (await other.ask(AbortCalls([], everything=True))).aborted == ["here"]
        assert (await failure_by_reading(call)).code is grpc.StatusCode.ABORTED


async def test_more_calls_are_aborted_than_an_answer_names(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "MAX_NAMED_CALLS", 2)
    async with serve(gateways=2) as served:
        other = Other(served.supervisor)
        served.leader.hold = True
        names = ["e", "b", "d", "a", "c"]
        calls = [served.generation.Generate(generate_request(ids(1), request_id=name)) for name in names]
        await eventually(lambda: len(served.leader.submits) == len(names))
        asking = asyncio.ensure_future(served.admin.Abort(admin_pb2.AbortRequest(all=True)))
        questions = []
        for theirs, more in ((["c2", "c3"], True), (["c4"], False), ([], False)):
            asked = await other.hear(Ask)
            questions.append(asked.question)
            served.supervisor.offer(Answer(asked.asker, asked.ticket, Standing(), theirs, more))
        assert [result.request_id for result in (await asking).results] == sorted([*names, "c2", "c3", "c4"])
        assert [question.after for question in questions] == ["", "b", "d"]
        for call in calls:
            assert (await failure_by_reading(call)).code is grpc.StatusCode.ABORTED


def test_as_many_ids_as_are_named_can_be_said() -> None:
    names = ['"' * 128] * MAX_NAMED_CALLS
    for message in (Answer(1, 1, Standing(), names, True), Ask(1, 1, AbortCalls(names, everything=False))):
        assert len(msgspec.json.encode(message)) <= MAX_OFFER_BYTES


async def test_draining_reaches_all_and_waits_for_all(serve: Serve) -> None:
    async with serve(gateways=2) as served:
        other = Other(served.supervisor)
        request = admin_pb2.DrainRequest(wait={"seconds": 20})
        asking = asyncio.ensure_future(served.admin.Drain(request))
        asked = await other.hear(Ask)
        assert asked.question == CloseDoor(20.0)
        await asyncio.sleep(0.1)
        assert not asking.done(), "the other still has something"
        served.supervisor.offer(Answer(asked.asker, asked.ticket, Standing(streams=2)))
        assert (await asking).streams == 2


async def test_another_gateway_drains_this_one(serve: Serve) -> None:
    async with serve(gateways=2) as served:
        other = Other(served.supervisor)
        served.leader.step_s = 0.01
        running = asyncio.create_task(collect(served.generation.Generate(generate_request(ids(1), max_tokens=50))))
        await eventually(lambda: bool(served.leader.running))
        assert (await other.ask(CloseDoor(0.0))).standing.streams == 1
        assert (await failure(served.generation.Generate(generate_request(ids(1))))).info.reason == "DRAINING"
        assert (await other.ask(CloseDoor(20.0))).standing.streams == 0
        assert len((await running).ids) == 50


async def test_silence_is_told_as_such(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "ANSWER_S", 0.3)
    async with serve(gateways=2) as served:
        other = Other(served.supervisor)
        failed = await failure(served.admin.GetLoad(admin_pb2.GetLoadRequest()))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "GATEWAY_SILENT")
        assert failed.has_retry
        late = await other.hear(Ask)
        served.supervisor.offer(Answer(late.asker, late.ticket, Standing(streams=9)))
        asking = asyncio.ensure_future(served.admin.GetLoad(admin_pb2.GetLoadRequest()))
        await other.answer(Standing(streams=3))
        assert (await asking).load.streams == 3, "what comes too late is no answer to the next question"


async def test_what_others_have_counted_is_added(serve: Serve) -> None:
    async with serve(gateways=2, metrics_port=0) as served:
        await collect(served.generation.Generate(generate_request(ids(1, 2), max_tokens=10)))
        await eventually(lambda: served.metric("generation_tokens_total") == 10)
        metrics = Metrics("tiny")
        metrics.call_ended("Generate", grpc.StatusCode.OK, 0.5)
        metrics.call_ended("Tokenize", grpc.StatusCode.OK, 0.002)  # which gateway 0 has not seen yet
        metrics.engine_stats(EngineStats(generated_tokens=10, running=7, step_rows=4, step_tokens=4), epoch=1)
        before = served.metric("batch_size_sum")
        other = Other(served.supervisor)
        other.tell(Standing(2, 2, 70), metrics)
        await eventually(lambda: served.metric("grpc_requests_total", method="Generate", code="OK") == 2)
        assert served.metric("grpc_seconds_bucket", method="Tokenize", le="0.0025") == 1
        assert served.metric("grpc_seconds_bucket", method="Tokenize", le="0.001") == 0
        assert served.metric("batch_size_sum") == before + 4
        assert (served.metric("requests_waiting"), served.metric("waiting_prompt_tokens")) == (2, 70)
        # The engine is one, and every gateway counts all of what it says.
        assert served.metric("generation_tokens_total") == 10
        assert served.metric("requests_running") == 0
        # What it told before is replaced.
        metrics.call_ended("Generate", grpc.StatusCode.OK, 0.5)
        other.tell(Standing(), metrics)
        await eventually(lambda: served.metric("grpc_requests_total", method="Generate", code="OK") == 3)
        assert served.metric("requests_waiting") == 0


async def test_others_leave_it_to_gateway_0_to_tell_prometheus(serve: Serve) -> None:
    async with serve(gateways=2, number=1, metrics_port=0) as served:
        assert "metrics" not in served.facts
        await collect(served.generation.Generate(generate_request(ids(1))))
        figures: Figures = await Other(served.supervisor).hear(Figures)
        while not finished_of(figures):
            figures = await Other(served.supervisor).hear(Figures)
        assert (figures.gateway, figures.standing, finished_of(figures), figures.last) == (1, Standing(), 1, False)
        await collect(served.generation.Generate(generate_request(ids(1))))
        served.supervisor.send(Drain())
        assert await asyncio.wait_for(served.running, 5) == 0
        *_, figures = [m for m in served.supervisor.receive() if isinstance(m, Figures)]
        assert (finished_of(figures), figures.last) == (2, True), "nothing that it counted is lost"
    async with serve(gateways=2, number=1) as served:
        await asyncio.sleep(1.2)
        assert not [m for m in served.supervisor.receive() if isinstance(m, Figures)], "nobody would tell them"


def finished_of(figures: Figures) -> float | None:
    metrics = Metrics("tiny")
    metrics.take(figures.gateway, figures.counted)
    return metrics.registry.get_sample_value("lightqwen_e2e_seconds_count", {"model": "tiny"})


def registry_of(*others: Metrics) -> CollectorRegistry:
    """Of a gateway with something of its own, and what others told it."""
    first = Metrics("m")
    first.call_ended("Generate", grpc.StatusCode.OK, 1.0)
    for number, other in enumerate(others, start=1):
        first.take(number, other.counted())
    return first.registry


def test_sums_are_valid_in_both_formats() -> None:
    others = [Metrics("m") for _ in range(3)]
    for other in others[1:]:
        other.call_ended("Detokenize", grpc.StatusCode.NOT_FOUND, 1.0)
    registry = registry_of(*others)
    text = list(parse_text(generate_latest(registry).decode()))
    open_text = list(parse_openmetrics(generate_openmetrics(registry).decode()))  # refuses series that are not together
    for families in (text, open_text):
        series = [(s.name, *sorted(s.labels.items())) for family in families for s in family.samples]
        assert len(series) == len(set(series))
    alone = {family.name for family in parse_text(generate_latest(registry_of()).decode())}
    assert {family.name for family in text} == alone
    labels = {"model": "m", "method": "Detokenize"}
    assert registry.get_sample_value("lightqwen_grpc_seconds_count", labels) == 2
    assert registry.get_sample_value("lightqwen_grpc_seconds_bucket", labels | {"le": "+Inf"}) == 2


def test_what_is_told_every_second_is_small() -> None:
    """A message of less than 16 KiB goes through a pipe as one."""
    metrics = Metrics("Qwen3-0.6B")
    for method in [f"Method{n}" for n in range(14)]:
        for code in grpc.StatusCode:
            metrics.call_ended(method, code, 0.123)
    assert len(zlib.decompress(metrics.counted())) > 32 * 1024
    assert len(metrics.counted()) * 4 / 3 < 16 * 1024, "in base64"


async def test_healthz_tells_of_a_gateway_that_was_not_heard() -> None:
    now = [100.0]
    heard = Gateways(
        number=0,
        count=3,
        control=ChildEnd(None),  # type: ignore[arg-type]  # says nothing here
        calls=OpenCalls(),
        admission=Admission(max_requests=1, max_tokens=1, max_streams=1),
        close_door=lambda: None,
        clock=lambda: now[0],
    )
    now[0] += 1000
    assert heard.problem is None, "they still start"
    heard.hear(Figures(1, Standing(), b""))
    heard.hear(Figures(2, Standing(), b""))
    now[0] += STALLED_S
    heard.hear(Figures(1, Standing(), b""))
    assert heard.problem is None
    now[0] += 1.0
    assert heard.problem == "gateway2 was not heard for 11 s"
    heard.hear(Figures(2, Standing(), b"", last=True))
    now[0] += 0.5 * STALLED_S
    heard.hear(Figures(1, Standing(), b""))
    now[0] += 0.7 * STALLED_S
    assert heard.problem is None, "one that has drained and ended has nothing more to say"


async def test_a_silent_gateway_is_unhealthy_over_http(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "STALLED_S", 0.3)
    async with serve(gateways=2, metrics_port=0) as served:
        url = str(served.facts["metrics"]).removesuffix("/metrics") + "/healthz"
        assert (await asyncio.to_thread(fetch, url))[0] == 200
        Other(served.supervisor).tell(Standing(), Metrics("tiny"))
        await asyncio.sleep(0.6)
        assert await asyncio.to_thread(fetch, url) == (503, "gateway1 was not heard for 1 s\n")


async def test_each_gateway_has_its_part_of_the_limits(serve: Serve) -> None:
    async with serve(gateways=2, max_queued_requests=3) as served:  # this one: 2
        served.leader.hold = True
        calls = [served.generation.Generate(generate_request(ids(n + 1))) for n in range(2)]
        await eventually(lambda: len(served.leader.submits) == 2)
        assert (await failure(served.generation.Generate(generate_request(ids(9))))).info.reason == "QUEUE_FULL"
        limits = (await served.model.GetServerInfo(model_pb2.GetServerInfoRequest())).limits
        assert limits.max_queued_requests == 3, "the server's"
        for call in calls:
            call.cancel()


# ---- the port --------------------------------------------------------------------------------------------------------


@pytest.fixture
def held() -> Iterator[int]:
    with hold_port("127.0.0.1", 0, "--port") as port:
        yield port


def listener(port: int, **options: int) -> socket.socket:
    """A socket of somebody else that listens there."""
    server = socket.socket()
    for option in options:
        server.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def grpc_server(port: int, *, shares: bool) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", int(shares))])
    assert bind(server, "127.0.0.1", port, "--port") == port
    server.start()
    return server


@pytest.mark.parametrize("options", [{}, {"SO_REUSEADDR": 1}, {"SO_REUSEPORT": 1, "SO_REUSEADDR": 1}])
def test_a_port_on_which_somebody_listens_is_not_ours_however_much_they_share(options: dict[str, int]) -> None:
    with listener(0, **options) as taken:
        port = taken.getsockname()[1]
        wanted = f"port {port} on 127.0.0.1 is in use; choose another with --port"
        with pytest.raises(ConfigError, match=wanted), hold_port("127.0.0.1", port, "--port"):
            pass


def test_gateways_share_a_held_port_with_nobody_else(held: int) -> None:
    wanted = f"port {held} on 127.0.0.1 is in use"
    with pytest.raises(ConfigError, match=wanted), hold_port("127.0.0.1", held, "--port"):
        pass
    gateways = [grpc_server(held, shares=True) for _ in range(2)]
    with pytest.raises(ConfigError, match=wanted), hold_port("127.0.0.1", held, "--port"):
        pass
    with pytest.raises(ConfigError, match=wanted):
        grpc_server(held, shares=False)
    for gateway in gateways:
        gateway.stop(0).wait(5)


def test_a_held_port_is_back_at_once_although_connections_linger() -> None:
    with (
        hold_port("127.0.0.1", 0, "--port") as port,
        listener(port, SO_REUSEADDR=1, SO_REUSEPORT=1) as server,
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        server.accept()[0].close()  # the end that closes first lingers
        assert client.recv(1) == b""
    with hold_port("127.0.0.1", port, "--port") as again:
        assert again == port


def test_no_connection_comes_to_the_socket_that_holds_the_port(held: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", held))
    with listener(held, SO_REUSEADDR=1, SO_REUSEPORT=1) as server:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", held)):
                server.settimeout(2)
                server.accept()[0].close()


# ---- the pipe --------------------------------------------------------------------------------------------------------


def test_an_end_that_does_not_read_keeps_nobody_waiting() -> None:
    ours, theirs = multiprocessing.Pipe()
    supervisor, child = SupervisorEnd(ours), ChildEnd(theirs)
    answer = Answer(0, 1, Standing(), ["x" * 100] * 50)
    began = time.monotonic()
    for _ in range(1000):
        supervisor.offer(answer)
    supervisor.offer(Answer(0, 2, Standing(), ["x" * 100] * 5000))
    assert time.monotonic() - began < 5
    assert child.receive() == answer, "those that had room are whole"
    ours.close()
    theirs.close()
