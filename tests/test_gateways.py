"""Two gateways of one server: connections land on both, and to clients, administrators and Prometheus they are one.

Starting a server takes some seconds, so each test is the life of one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from lightqwen.client import AsyncClient, Delta, LightqwenError
from lightqwen.v1 import admin_pb2, admin_pb2_grpc
from service.gateways import ANSWER_S
from tests.processes import Serve, is_alive, until
from tests.service.test_tls import replace

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux", reason="several gateways share a port on Linux only"),
]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
"""Of each client: a connection of its own, and every refusal shows."""
PROMPT = list(range(300, 320))
LONG = 250
"""Tokens that take long enough for something to happen meanwhile."""


@contextmanager
def serving(*options: str) -> Iterator[Serve]:
    server = Serve.start("--port", "0", "--gateways", "2", "--num-blocks", "1024", *options)
    try:
        yield server
    finally:
        server.close()


@asynccontextmanager
async def both(address: str, **access: Any) -> AsyncIterator[list[AsyncClient]]:
    """A client of each gateway: connections are opened until both have one. `access`: credentials and metadata."""
    found: dict[str, AsyncClient] = {}
    async with AsyncExitStack() as stack:
        for _ in range(50):
            client = AsyncClient(address, options=OPTIONS, **access)
            await stack.enter_async_context(client)
            found.setdefault((await client.server_info(timeout=10)).instance_id, client)
            if len(found) == 2:
                break
        assert len(found) == 2, "50 connections landed on one gateway"
        yield list(found.values())


class Stream:
    """A request on its way."""

    def __init__(self, client: AsyncClient, max_tokens: int = LONG, request_id: str | None = None) -> None:
        self.tokens: list[int] = []
        self._generation = client.generate(
            PROMPT, max_tokens=max_tokens, temperature=0, token_ids=True, text=False, request_id=request_id
        )
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> list[int]:
        async for event in self._generation:
            if isinstance(event, Delta):
                self.tokens += event.token_ids
        return self.tokens

    async def reach(self, count: int) -> None:
        """Wait until so many tokens are there, and more to come."""
        async with asyncio.timeout(30):
            while len(self.tokens) < count:
                assert not self._task.done()
                await asyncio.sleep(0.005)

    async def finish(self) -> list[int]:
        """Every token. Raises LightqwenError when the stream is lost."""
        return await asyncio.wait_for(self._task, 60)


class Secrets:
    """A certificate, its key and a token, in files that the next ones replace."""

    def __init__(self, folder: Path, token: str) -> None:
        self._folder = folder
        self._token = token
        self._authority = trustme.CA()

    @property
    def options(self) -> list[str]:
        cert, key, tokens = (str(self._folder / name) for name in ("tls.crt", "tls.key", "tokens"))
        return ["--tls-cert", cert, "--tls-key", key, "--auth-tokens-file", tokens]

    @property
    def access(self) -> dict[str, Any]:
        credentials = grpc.ssl_channel_credentials(self._authority.cert_pem.bytes())
        return {"credentials": credentials, "metadata": [("authorization", f"Bearer {self._token}")]}

    def put(self) -> None:
        leaf = self._authority.issue_cert("127.0.0.1")
        replace(self._folder / "tls.key", leaf.private_key_pem.bytes())
        replace(self._folder / "tls.crt", leaf.cert_chain_pems[0].bytes())
        replace(self._folder / "tokens", f"caller:{self._token}\n".encode())


def admin(client: AsyncClient) -> Any:
    return admin_pb2_grpc.AdminServiceStub(client.channel)


async def health(client: AsyncClient) -> int:
    stub: Any = health_pb2_grpc.HealthStub(client.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status)


async def answers(client: AsyncClient) -> bool:
    """Whether the gateway that it is connected to does so."""
    try:
        return bool(await client.server_info(timeout=2))
    except LightqwenError:
        return False


def probe(address: str) -> int:
    with closing(grpc.insecure_channel(address)) as channel:
        return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status)


def samples(url: str) -> dict[str, float]:
    """What /metrics has with no label but the model's, by name; fails if any series is there twice."""
    with urllib.request.urlopen(url, timeout=5) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    found = [(s.name, frozenset(s.labels.items()), s.value) for family in families for s in family.samples]
    assert not [series for series, count in Counter((name, labels) for name, labels, _ in found).items() if count > 1]
    return {name: value for name, labels, value in found if len(labels) == 1}


async def test_to_those_outside_they_are_one_server() -> None:
    with serving("--metrics-port", "0", "--health-port", "0") as server:
        facts = await asyncio.to_thread(server.wait_ready)
        assert facts["gateways"] == "2"
        assert len(server.workers) == 3
        async with both(server.address) as (first, second):
            # The same tokens through both, and metrics are sums: each step is told once, whoever had a part in it.
            expected = await Stream(first).finish()
            assert len(expected) == LONG
            together = [Stream(client) for client in (first, second, second)]
            assert [await stream.finish() for stream in together] == [expected] * 3
            wanted = {
                "lightqwen_e2e_seconds_count": 4,
                "lightqwen_ttft_seconds_count": 4,
                "lightqwen_prompt_tokens_total": 4 * len(PROMPT),
                "lightqwen_generation_tokens_total": 4 * LONG,
                "lightqwen_batch_size_sum": 4 * LONG,  # in each step, each row drew a token
            }
            await asyncio.to_thread(
                until, lambda: wanted.items() <= samples(facts["metrics"]).items(), 10.0, "the sums are others"
            )

            # The load is that of the server, whoever is asked.
            streams = {
                name: Stream(client, 3000, name) for name, client in (("a", first), ("b", second), ("c", second))
            }
            for stream in streams.values():
                await stream.reach(3)
            assert [(load.streams, load.running) for load in (await first.load(), await second.load())] == [(3, 3)] * 2
            watch = admin(first).WatchLoad(admin_pb2.WatchLoadRequest())
            assert (await watch.read()).load.streams == 3
            watch.cancel()
            await asyncio.to_thread(
                until, lambda: server.metric("streams_in_flight") == 3, 10.0, "the gauge is not that of both"
            )

            # An id is found wherever it is.
            got = await admin(first).Abort(admin_pb2.AbortRequest(request_ids=["b", "nobody", "a"]))
            assert [(result.request_id, result.outcome) for result in got.results] == [
                ("b", admin_pb2.ABORT_OUTCOME_ABORTED),
                ("nobody", admin_pb2.ABORT_OUTCOME_NOT_FOUND),
                ("a", admin_pb2.ABORT_OUTCOME_ABORTED),
            ]
            got = await admin(first).Abort(admin_pb2.AbortRequest(all=True))
            assert [result.request_id for result in got.results] == ["c"]
            for stream in streams.values():
                with pytest.raises(LightqwenError, match="ABORTED"):
                    await stream.finish()
            assert (await second.load()).streams == 0

            # The ranks die, and what runs through both goes on.
            running = [Stream(first), Stream(second)]
            for stream in running:
                await stream.reach(5)
            os.kill(server.workers[2], signal.SIGKILL)
            assert [await stream.finish() for stream in running] == [expected] * 2
            server.look()
            assert server.metric("engine_restarts_total") == 1
            await asyncio.to_thread(until, lambda: probe(facts["health"]) == SERVING, 10.0, "it takes none again")

            # Draining one drains all, and loses none.
            running = [Stream(first), Stream(second)]
            longest = [Stream(first, 3000), Stream(second, 3000)]
            for stream in (*running, *longest):
                await stream.reach(5)
            assert (await admin(first).Drain(admin_pb2.DrainRequest())).streams == 4
            for client in (first, second):
                assert await health(client) == NOT_SERVING
                with pytest.raises(LightqwenError, match="draining"):
                    await Stream(client).finish()
            await asyncio.to_thread(
                until, lambda: probe(facts["health"]) == NOT_SERVING, 10.0, "it still takes requests"
            )
            assert [await stream.finish() for stream in running] == [expected] * 2
            assert (await admin(second).Drain(admin_pb2.DrainRequest(wait={"nanos": 10_000_000}))).streams == 2

            # The first signal lets what runs go on; the second ends all.
            server.process.terminate()
            await asyncio.sleep(0.5)
            for stream in longest:
                await stream.reach(len(stream.tokens) + 5)
            server.process.terminate()
            assert await asyncio.to_thread(server.exit_code, 10) == 0
            for stream in longest:
                with pytest.raises(LightqwenError, match="UNAVAILABLE"):
                    await stream.finish()


async def test_sigterm_drains_both_secrets_are_read_again_and_the_port_is_nobody_elses(tmp_path: Path) -> None:
    secrets = [Secrets(tmp_path, "first"), Secrets(tmp_path, "second")]
    secrets[0].put()
    with serving(*secrets[0].options) as server:
        await asyncio.to_thread(server.wait_ready)
        port = server.address.rpartition(":")[2]
        with serving("--port", port) as other:
            assert await asyncio.to_thread(other.exit_code, 60) == 1
            assert f"port {port} on 127.0.0.1 is in use; choose another with --port" in other.errors()
        async with both(server.address, **secrets[0].access):
            pass
        secrets[1].put()
        async with both(server.address, **secrets[1].access) as clients:
            for client in clients:
                with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                    await admin(client).GetLoad(admin_pb2.GetLoadRequest(), metadata=secrets[0].access["metadata"])
            expected = await Stream(clients[0]).finish()
            short, long = Stream(clients[0]), Stream(clients[1], 4 * LONG)
            for stream in (short, long):
                await stream.reach(5)
            server.process.terminate()
            assert await short.finish() == expected
            assert (await long.finish())[:LONG] == expected, "it goes on when the other gateway has ended"
        assert await asyncio.to_thread(server.exit_code, 30) == 0


async def test_a_gateway_that_hangs_is_told_of_and_one_that_is_killed_ends_the_server() -> None:
    with serving() as server:
        await asyncio.to_thread(server.wait_ready)
        async with both(server.address) as clients:
            stuck = server.workers[1]
            os.kill(stuck, signal.SIGSTOP)
            first, second = clients if await answers(clients[0]) else clients[::-1]
            stream = Stream(first)
            for method, request in (
                (admin(first).GetLoad, admin_pb2.GetLoadRequest()),
                (admin(first).Abort, admin_pb2.AbortRequest(request_ids=["nobody"])),
            ):
                began = time.monotonic()
                with pytest.raises(
                    grpc.aio.AioRpcError, match="another gateway of this server did not answer"
                ) as caught:
                    await method(request)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert ANSWER_S <= time.monotonic() - began < ANSWER_S + 3
            assert len(await stream.finish()) == LONG, "the other serves on"
            os.kill(stuck, signal.SIGCONT)
            assert (await first.load(timeout=10)).streams == 0

            streams = [Stream(client, 3000) for client in (first, second)]
            for stream in streams:
                await stream.reach(5)
            os.kill(stuck, signal.SIGKILL)
            assert await asyncio.to_thread(server.exit_code, 20) == 1
            # Python's own helper process ends once it finds the supervisor gone.
            await asyncio.to_thread(until, lambda: not any(map(is_alive, server.seen)), 10.0, "a process is left")
            for stream in streams:
                with pytest.raises(LightqwenError, match="UNAVAILABLE"):
                    await stream.finish()
