"""The gateway's end of the engine, on a real socket, against a leader that is only pretended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.service.fake_leader import FakeLeader, count_up, private_endpoint
from worker.client import (
    EngineClient,
    EngineEndpoint,
    EngineFailedError,
    EngineRequest,
    EngineState,
    EngineUnavailableError,
    TokenStream,
)
from worker.messages import Finished, FinishReason, SamplingParams


@pytest.fixture
def leader() -> Iterator[FakeLeader]:
    with FakeLeader(private_endpoint()) as leader:
        yield leader


@pytest.fixture
async def client(leader: FakeLeader) -> AsyncIterator[EngineClient]:
    client = EngineClient(leader.endpoint)
    client.open()
    try:
        async with asyncio.timeout(5):
            await client.wait_ready()
        yield client
    finally:
        client.close()


def request(*prompt: int, max_tokens: int = 10) -> EngineRequest:
    return EngineRequest(prompt_ids=prompt, sampling=SamplingParams(), max_tokens=max_tokens)


async def drain(stream: TokenStream) -> tuple[list[list[int]], Finished]:
    """The batches of a stream, to its end."""
    batches: list[list[int]] = []
    async with asyncio.timeout(10):
        while True:
            batch = await stream.next()
            if batch.tokens:
                batches.append(batch.tokens)
            if batch.finished is not None:
                return batches, batch.finished


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for is another thread's
            await asyncio.sleep(0.005)


async def test_tokens_come_in_order_and_the_first_alone(client: EngineClient, leader: FakeLeader) -> None:
    stream = client.submit(request(1, 2, max_tokens=30))
    await eventually(lambda: leader.generated == 30)
    await asyncio.sleep(0.05)
    batches, finished = await drain(stream)
    assert len(batches[0]) == 1
    assert len(batches) == 2  # everything else had come by then
    assert [token for batch in batches for token in batch] == [count_up([1, 2], i) for i in range(30)]
    assert finished.reason is FinishReason.MAX_TOKENS
    assert client.num_streams == 0


async def test_who_does_not_know_the_secret_gets_nothing(leader: FakeLeader) -> None:
    client = EngineClient(EngineEndpoint(leader.endpoint.address, b"guess"))
    client.open()
    try:
        await eventually(lambda: leader.strangers > 0)
        await asyncio.sleep(0.05)
        assert client.state is EngineState.STARTING
        with pytest.raises(EngineUnavailableError, match="starting"):
            client.submit(request(1))
    finally:
        client.close()


async def test_an_abort_is_told_once_and_confirmed(leader: FakeLeader) -> None:
    confirmed: list[float] = []
    client = EngineClient(leader.endpoint, on_abort_confirmed=confirmed.append)
    client.open()
    try:
        await client.wait_ready()
        stream = client.submit(request(1, max_tokens=200))
        await stream.next()
        client.abort(stream)
        client.abort(stream)
        await eventually(lambda: bool(confirmed))
        assert leader.aborts == [stream.number]
        assert not leader.running
        finished = client.submit(request(2, max_tokens=1))
        await drain(finished)
        client.abort(finished)
        await asyncio.sleep(0.05)
        assert leader.aborts == [stream.number]
    finally:
        client.close()


async def test_streams_go_on_with_another_leader_without_loss_or_repetition(
    client: EngineClient, leader: FakeLeader
) -> None:
    leader.step_s = 0.01
    streams = [client.submit(request(n, max_tokens=50)) for n in range(5)]
    draining = [asyncio.create_task(drain(stream)) for stream in streams]
    for epoch in (2, 3):
        await eventually(lambda leader=leader: leader.generated > 25)  # type: ignore[misc]
        leader.die()
        client.engine_lost(epoch - 1, "killed")
        with pytest.raises(EngineUnavailableError):
            client.submit(request(1))
        leader = FakeLeader(leader.endpoint, epoch=epoch, step_s=0.01).__enter__()
    try:
        for n, (batches, finished) in enumerate(await asyncio.gather(*draining)):
            assert [token for batch in batches for token in batch] == [count_up([n], i) for i in range(50)]
            assert finished.reason is FinishReason.MAX_TOKENS
        assert client.info is not None
        assert client.info.epoch == 3
    finally:
        leader.die()


async def test_a_leader_of_the_same_epoch_is_not_believed(client: EngineClient, leader: FakeLeader) -> None:
    leader.hold = True
    client.submit(request(1))
    await eventually(lambda: len(leader.submits) == 1)
    leader.die()
    client.engine_lost(1, "killed")
    with FakeLeader(leader.endpoint, epoch=1) as impostor:
        await asyncio.sleep(0.3)
        assert client.state is EngineState.RESTARTING
        assert impostor.submits == []


async def test_news_of_a_death_that_come_after_the_new_ranks_change_nothing(
    client: EngineClient, leader: FakeLeader
) -> None:
    leader.step_s = 0.01
    stream = client.submit(request(1, max_tokens=50))
    await eventually(lambda: leader.generated > 5)
    leader.die()
    with FakeLeader(leader.endpoint, epoch=2, step_s=0.01):
        await eventually(lambda: client.info is not None and client.info.epoch == 2)
        client.engine_lost(1, "killed")
        assert client.state is EngineState.READY
        batches, finished = await drain(stream)
    assert [token for batch in batches for token in batch] == [count_up([1], i) for i in range(50)]
    assert finished.reason is FinishReason.MAX_TOKENS


async def test_a_loop_that_was_blocked_while_the_ranks_died_and_came_again_loses_nothing(
    client: EngineClient, leader: FakeLeader
) -> None:
    """It finds both in its queue: what the dead said, and that others are there."""
    leader.step_s = 0.001
    stream = client.submit(request(1, max_tokens=200))
    while leader.generated < 100:
        time.sleep(0.01)  # noqa: ASYNC251 - blocks the loop, as a bug would
    leader.die()
    with FakeLeader(leader.endpoint, epoch=2, step_s=0.001):
        time.sleep(0.2)  # noqa: ASYNC251
        batches, finished = await drain(stream)
    assert [token for batch in batches for token in batch] == [count_up([1], i) for i in range(200)]
    assert finished.reason is FinishReason.MAX_TOKENS


async def test_only_ranks_that_ran_a_request_count_against_it_when_they_die(
    client: EngineClient, leader: FakeLeader
) -> None:
    stream = client.submit(request(1, max_tokens=100))
    await eventually(lambda: leader.generated > 5)
    leader.die()
    for epoch in (1, 2, 3, 4):  # the first had the request; the others died while they loaded weights
        client.engine_lost(epoch, "killed")
    with FakeLeader(leader.endpoint, epoch=5):
        batches, _ = await drain(stream)
    assert [token for batch in batches for token in batch] == [count_up([1], i) for i in range(100)]


async def test_a_dead_engine_fails_what_runs_and_wakes_who_waits(client: EngineClient, leader: FakeLeader) -> None:
    leader.hold = True
    stream = client.submit(request(1))
    flushing = asyncio.create_task(client.flush_cache())
    waiting = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    client.engine_dead("for good")
    with pytest.raises(EngineFailedError, match="for good"):
        await waiting
    with pytest.raises(EngineUnavailableError) as caught:
        await client.wait_ready()
    assert not caught.value.retryable
    await asyncio.gather(flushing, return_exceptions=True)
    assert client.num_streams == 0


async def test_closing_says_goodbye_and_never_blocks(leader: FakeLeader) -> None:
    client = EngineClient(leader.endpoint)
    client.open()
    await client.wait_ready()
    client.close()
    await eventually(lambda: leader.goodbyes == 1)
    lonely = EngineClient(private_endpoint())
    lonely.open()
    lonely.close()
