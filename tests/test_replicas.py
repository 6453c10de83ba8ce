"""Two whole servers behind one client: calls spread over both, and none is lost while one of them drains."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from lightqwen.client import BALANCED_OPTIONS, AsyncClient, Delta
from tests.processes import Serve

pytestmark = pytest.mark.timeout(180)

PROMPT = list(range(300, 320))
TOKENS = 40
CALLERS = 6


@pytest.fixture
def replicas() -> Iterator[list[Serve]]:
    servers = [Serve.start("--port", "0", "--withdrawal-s", "1.5", "--drain-timeout-s", "30") for _ in range(2)]
    for server in servers:
        server.wait_ready()
    yield servers
    for server in servers:
        server.close()


async def answer(client: AsyncClient) -> list[int]:
    """Raises LightqwenError when the call is lost."""
    generation = client.generate(
        PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True, token_ids=True, text=False, timeout=60
    )
    return [token for event in [e async for e in generation] if isinstance(event, Delta) for token in event.token_ids]


async def test_one_of_two_drains_under_load_and_no_call_is_lost(replicas: list[Serve]) -> None:
    first, second = replicas
    answered: Counter[str] = Counter()  # calls by the server that answered
    calls = 0
    stop = asyncio.Event()

    async with (
        AsyncClient(f"ipv4:{first.address},{second.address}", options=BALANCED_OPTIONS) as client,
        AsyncClient(first.address) as direct,
    ):
        expected = await answer(client)

        async def call_on() -> None:
            nonlocal calls
            while not stop.is_set():
                answered[(await client.server_info(timeout=30)).instance_id] += 1
                assert await answer(client) == expected
                calls += 1

        async def until_calls(count: int) -> None:
            give_up = time.monotonic() + 60
            while calls < count:
                assert time.monotonic() < give_up
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(call_on())
            await until_calls(2 * CALLERS)
            assert len(answered) == 2, "both answer"

            while not (await direct.load()).streams:  # noqa: ASYNC110 - another process has it
                await asyncio.sleep(0.005)
            first.process.terminate()  # with a stream on it
            assert await asyncio.to_thread(first.exit_code, 60) == 0
            answered.clear()
            await until_calls(calls + 2 * CALLERS)
            stop.set()
        assert len(answered) == 1, "one answers for both"

    second.process.terminate()
    assert await asyncio.to_thread(second.exit_code, 30) == 0
