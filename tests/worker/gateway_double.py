"""A server without its gateway's trade: `serve` with a gateway that takes token ids over a plain socket.

The test that starts it as a process (`main`) sends one JSON line per connection, `{"prompt": [...], "max_tokens": n}`,
and reads JSON lines: tokens as they come, then how it ended. Reports of the supervisor come as JSON lines on stdout.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import sys
from multiprocessing.connection import Connection

from worker.client import (
    EngineClient,
    EngineEndpoint,
    EngineFailedError,
    EngineRequest,
    EngineUnavailableError,
    TokenStream,
)
from worker.config import ConfigError, EngineConfig
from worker.control import ChildEnd, Drain, EngineDead, EngineLost, Progress, Stop, Up
from worker.messages import SamplingParams
from worker.supervisor import Facts, serve


class Gateway:
    """One gateway process."""

    def __init__(self, endpoint: EngineEndpoint, connection: Connection) -> None:
        self.client = EngineClient(endpoint)
        self.control = ChildEnd(connection)
        self.stop = asyncio.Event()
        self.streams = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.client.open()
        loop.add_reader(self.control.fileno(), self._on_control)
        await self.client.wait_ready()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.control.send(Up({"port": server.sockets[0].getsockname()[1], "pid": os.getpid()}))
        await self.stop.wait()
        server.close()
        await self.idle.wait()
        self.client.close()

    def _on_control(self) -> None:
        message = self.control.receive()
        if message is None:
            os._exit(3)
        elif isinstance(message, Drain | Stop):
            self.stop.set()
        elif isinstance(message, EngineLost):
            self.client.engine_lost(message.epoch, message.reason)
        elif isinstance(message, EngineDead):
            self.client.engine_dead(message.reason)
            self.stop.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(**what: object) -> None:
            writer.write(json.dumps(what).encode() + b"\n")

        asked = json.loads(await reader.readline())
        request = EngineRequest(
            prompt_ids=asked["prompt"], sampling=SamplingParams(temperature=0.0), max_tokens=asked["max_tokens"]
        )
        self.streams += 1
        self.idle.clear()
        try:
            stream = self.client.submit(request)
            await self._pass_on(stream, tell)
        except (EngineFailedError, EngineUnavailableError) as error:
            tell(failed=str(error))
        finally:
            writer.close()
            await writer.wait_closed()
            self.streams -= 1
            if not self.streams:
                self.idle.set()

    async def _pass_on(self, stream: TokenStream, tell: functools.partial[None]) -> None:
        while True:
            batch = await stream.next()
            tell(tokens=batch.tokens)
            if batch.finished is not None:
                epoch = self.client.info.epoch if self.client.info is not None else 0
                return tell(reason=batch.finished.reason.value, epoch=epoch)


def gateway(endpoint: EngineEndpoint, connection: Connection) -> None:
    """What `serve` runs in the gateway's process."""
    asyncio.run(Gateway(endpoint, connection).run())


def main() -> None:
    """Serve as the first argument, an EngineConfig in JSON, says."""

    def report(**what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def on_progress(process: str, progress: Progress) -> None:
        report(process=process, progress=progress.what)

    def on_ready(facts: Facts, seconds: float) -> None:
        report(ready=facts)

    logging.basicConfig(level="INFO")
    try:
        code = serve(
            EngineConfig.model_validate_json(sys.argv[1]),
            [gateway],
            drain_timeout_s=20.0,
            on_progress=on_progress,
            on_ready=on_ready,
            set_up_logging=functools.partial(logging.basicConfig, level="INFO"),
        )
    except ConfigError as error:
        report(config_error=str(error))
        code = 2
    sys.exit(code)
