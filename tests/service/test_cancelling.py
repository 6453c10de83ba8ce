"""However a client leaves, the engine hears of it at once and nothing is held any more."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from typing import Any
from unittest.mock import Mock

import grpc
import pytest

from lightqwen.v1 import generation_pb2_grpc
from service.errors import _code_of_loss
from tests.service.conftest import Served, collect, eventually, generate_request, ids
from tests.service.fake_leader import MAX_MODEL_LEN


async def nothing_is_held(served: Served, aborts: int = 1) -> None:
    """The engine was told exactly so often, and neither it nor the gateway still knows the requests."""
    await eventually(lambda: len(served.leader.aborts) == aborts and not served.leader.running)
    admission = served.gateway._admission
    await eventually(lambda: len(served.gateway._calls) == 0)
    assert (admission.streams, admission.waiting_requests, admission.waiting_tokens) == (0, 0, 0)
    assert served.gateway._engine.num_streams == 0
    assert served.metric("streams_in_flight") == 0


async def test_cancelled_while_it_waits_for_a_token(served: Served) -> None:
    call = served.generation.Generate(generate_request(ids(1), max_tokens=200))
    await call.read()
    served.leader.hold = True
    began = time.monotonic()
    call.cancel()
    await nothing_is_held(served)
    assert served.leader.aborted_at[0] - began < 0.5
    assert served.metric("cancelled_total", stage="decode") + served.metric("cancelled_total", stage="prefill") == 1
    assert served.metric("grpc_requests_total", method="Generate", code="CANCELLED") == 1
    await eventually(lambda: served.metric("cancel_to_free_seconds_count") == 1)


async def test_cancelled_in_the_queue(served: Served) -> None:
    served.leader.hold = True
    call = served.generation.Generate(generate_request(ids(1)))
    await eventually(lambda: len(served.leader.submits) == 1)
    assert served.gateway._admission.waiting_requests == 1
    call.cancel()
    await nothing_is_held(served)
    assert served.metric("cancelled_total", stage="queued") == 1


async def test_cancelled_while_it_is_tokenized(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    began = asyncio.Event()

    async def never(*args: Any, **kwargs: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(served.gateway._codec, "encode", never)
    call = served.generation.Generate(generate_request("some text"))
    asyncio.get_running_loop().call_later(0.1, call.cancel)
    await began.wait()
    assert served.gateway._admission.waiting_tokens > 0
    await nothing_is_held(served, aborts=0)
    assert served.leader.submits == []
    assert served.metric("cancelled_total", stage="tokenizing") == 1


async def test_cancelled_while_the_handler_is_blocked_in_a_write(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that does not read blocks the write only after very many small messages: so make them large."""
    from service import convert

    real = convert.event

    def large(event: Any, *args: Any) -> Any:
        response = real(event, *args)
        if response.WhichOneof("event") == "delta":
            response.delta.text = "x" * 200_000
        return response

    monkeypatch.setattr(convert, "event", large)
    served.leader.step_s = 0.02
    call = served.generation.Generate(generate_request(ids(1), max_tokens=200))
    await call.read()
    stream = next(iter(served.gateway._engine._streams.values()))
    await eventually(lambda: len(stream._pending.tokens) >= 3)  # tokens come, and nobody fetches them
    call.cancel()
    await nothing_is_held(served)
    assert served.metric("grpc_requests_total", method="Generate", code="CANCELLED") == 1


async def test_a_reader_that_does_not_read_hinders_nobody(served: Served) -> None:
    slow = [served.generation.Generate(generate_request(ids(1), max_tokens=250)) for _ in range(4)]
    for call in slow:
        await call.read()
    got = await collect(served.generation.Generate(generate_request(ids(2), max_tokens=100)))
    assert len(got.ids) == 100
    await eventually(lambda: not served.leader.running)  # the engine finished them without their readers
    for call in slow:
        tokens = 0
        while (response := await call.read()) is not grpc.aio.EOF:
            tokens += len(response.delta.token_ids)
        assert tokens == 250


@pytest.mark.parametrize(
    ("remaining", "code"),
    [
        (None, grpc.StatusCode.CANCELLED),
        (5.0, grpc.StatusCode.CANCELLED),
        (0.02, grpc.StatusCode.DEADLINE_EXCEEDED),
        (-0.1, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_a_client_that_gives_up_at_its_deadline_did_not_cancel(remaining: float | None, code: grpc.StatusCode) -> None:
    """By the server's clock it does so a little early."""
    context = Mock(spec=grpc.aio.ServicerContext, time_remaining=lambda: remaining)
    assert _code_of_loss(context) is code


async def test_the_deadline_ends_it_with_its_own_status(served: Served) -> None:
    served.leader.step_s = 0.05
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(served.generation.Generate(generate_request(ids(1), max_tokens=200), timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await nothing_is_held(served)
    assert served.metric("grpc_requests_total", method="Generate", code="DEADLINE_EXCEEDED") == 1
    assert served.metric("requests_finished_total", reason="max_tokens") == 0


async def test_a_deadline_in_the_queue_costs_no_prefill(served: Served) -> None:
    served.leader.hold = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(served.generation.Generate(generate_request(ids(1)), timeout=0.2))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await nothing_is_held(served)
    assert served.leader.prompt_tokens == 0


def _read_one_and_hang(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        for _ in stub.Generate(generate_request(ids(1), max_tokens=MAX_MODEL_LEN)):
            time.sleep(60)


async def test_a_killed_client_is_noticed(served: Served) -> None:
    served.leader.step_s = 0.05
    client = multiprocessing.get_context("spawn").Process(target=_read_one_and_hang, args=(served.address,))
    client.start()
    try:
        await eventually(lambda: bool(served.leader.running), timeout_s=20)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await nothing_is_held(served)
    finally:
        client.kill()
        await asyncio.to_thread(client.join)


async def test_many_that_come_and_go_leave_nothing(served: Served) -> None:
    served.leader.step_s = 0.005

    async def visit(number: int) -> bool:
        call = served.generation.Generate(generate_request("the quick brown fox" * (number % 5 + 1), max_tokens=40))
        if number % 4 == 0:
            return len((await collect(call)).ids) == 40
        await asyncio.sleep(number % 7 * 0.004)
        call.cancel()
        return True

    assert all(await asyncio.gather(*(visit(number) for number in range(100))))
    await eventually(lambda: not served.leader.running and len(served.gateway._calls) == 0)
    assert (served.gateway._admission.waiting_tokens, served.gateway._admission.streams) == (0, 0)
    assert (await collect(served.generation.Generate(generate_request(ids(3))))).finished.usage.output_tokens == 8


async def test_pings_on_a_silent_stream_are_no_crime(served: Served) -> None:
    """With the key that many servers set by mistake, the third ping within 5 minutes of silence ends the connection."""
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    served.leader.hold = True
    async with grpc.aio.insecure_channel(served.address, options=options) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generate_request(ids(1), max_tokens=5))
        await asyncio.sleep(6)
        served.leader.hold = False
        assert len((await collect(call)).ids) == 5
