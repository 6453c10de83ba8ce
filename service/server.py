"""A gateway process: what it is built of, and its life from the first bind to the last stream.

Signals and messages only set events; `Gateway.run` reads as the order of things.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lightqwen.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from service.admin_service import AdminServicer
from service.admission import Admission, part_of
from service.auth import Authenticator, AuthInterceptor
from service.checkpoint import read_card, read_tokenizer_files
from service.config import ServeConfig
from service.errors import DrainingError, StatusInterceptor
from service.gateways import Gateways, queue
from service.generation import GenerationServicer
from service.http import HttpEndpoint
from service.metrics import Metrics
from service.model_service import ModelServicer
from service.ports import bind, cannot_listen, host_port
from service.streams import OpenCalls
from service.tls import ServerCertificate
from service.tokenizing import TextCodec
from service.validation import Rules
from worker.client import EngineClient, EngineState, EngineUnavailableError
from worker.config import ConfigError
from worker.control import (
    Answer,
    Ask,
    ChildEnd,
    Drain,
    EngineDead,
    EngineLost,
    Fatal,
    Figures,
    Heartbeat,
    Serving,
    Stop,
    Up,
)
from worker.endpoint import EngineEndpoint
from worker.messages import EngineStats
from worker.vitals import STALLED_S

logger = logging.getLogger(__name__)

SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generation_pb2, "GenerationService"),
        (model_pb2, "ModelService"),
        (admin_pb2, "AdminService"),
    )
)

EXIT_DONE = 0
EXIT_LOST = 1  # the engine, or the supervisor
EXIT_CONFIG = 2

LAST_WORDS_S = 2.0
"""How long streams have, once the engine is gone for good, to learn it."""

STOP_GRACE_S = 1.0
LAG_PERIOD_S = 0.25
BEAT_PERIOD_S = 1.0


def server_options(config: ServeConfig) -> list[tuple[str, int]]:
    """What gRPC's core is told. Pings are the client's right: one in 10 s is fine, and too many are no crime."""
    return [
        ("grpc.so_reuseport", int(config.gateways > 1)),
        ("grpc.max_receive_message_length", config.max_receive_message_bytes),
        # Refusing is ours: the core would cancel calls at random, probes too, while 1000 of them wait to be taken up.
        ("grpc.server.max_pending_requests", 2**20),
        ("grpc.server.max_pending_requests_hard_limit", 2**20),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_connection_age_ms", 600_000),  # balancers look again; running streams go on
    ]


def run_gateway(config: ServeConfig, endpoint: EngineEndpoint, control: Connection, *, number: int = 0) -> None:
    """Be a gateway process: never returns, exits with 0 after it was told to, 2 for what a user can mend, else 1.

    Args:
        config: `config.model` is a local folder. Where several gateways share the port, it is a certain one.
        endpoint: where the leader listens.
        control: the line to the supervisor.
        number: which of `config.gateways` it is, from 0, which also answers for all of them over HTTP.
    """
    child = ChildEnd(control)
    try:
        gateway = Gateway(config, endpoint, child, number)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            code = runner.run(gateway.run())
    except ConfigError as error:
        child.send(Fatal(str(error)))
        code = EXIT_CONFIG
    sys.exit(code)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class Gateway:
    """Everything of one gateway, put together.

    Raises:
        ConfigError: the model's folder cannot be served, or a certificate or tokens file is no good.
    """

    def __init__(self, config: ServeConfig, endpoint: EngineEndpoint, control: ChildEnd, number: int = 0) -> None:
        folder = Path(config.model)
        self._config = config
        self._number = number
        self._control = control
        self._authenticator = Authenticator(config.auth_tokens_file, config.admin_tokens_file)
        self._certificate = _certificate(config)
        if self._authenticator.wants_tokens and self._certificate is None and not _is_loopback(config.host):
            logger.warning("tokens travel in plain text to %s: set --tls-cert, or encrypt before it", config.host)
        self._card = read_card(
            folder, name=config.served_model_name or folder.resolve().name, revision=config.revision or ""
        )
        self._executor = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="tokenizer")
        files = read_tokenizer_files(folder)
        self._codec = None if files is None else TextCodec(files, self._executor)
        if self._codec is None:
            logger.warning("no tokenizer.json in %s: only token ids are served", folder)
        elif len(self._codec.table.pieces) > self._card.vocab_size:
            raise ConfigError(
                f"{folder}: the tokenizer has token ids up to {len(self._codec.table.pieces) - 1}, the model only "
                f"{self._card.vocab_size}; they do not belong together"
            )
        self._rules = Rules(
            config,
            self._card,
            has_tokenizer=self._codec is not None,
            has_chat_template=self._codec is not None and self._codec.has_chat_template,
        )
        self._metrics = Metrics(self._card.name)
        self._calls = OpenCalls()
        self._admission = Admission(
            max_requests=part_of(config.max_queued_requests, number, config.gateways),
            max_tokens=part_of(config.max_queued_tokens, number, config.gateways),
            max_streams=part_of(config.max_streams, number, config.gateways),
            on_reject=self._metrics.rejected,
        )
        self._gateways = Gateways(
            number=number,
            count=config.gateways,
            control=control,
            calls=self._calls,
            admission=self._admission,
            close_door=self._close_door,
        )
        self._engine = EngineClient(
            endpoint,
            on_stats=self._on_stats,
            on_state=self._on_state,
            on_abort_confirmed=self._metrics.abort_confirmed,
        )
        self._metrics.watch_queue(lambda: queue(self._gateways.last_known, self._engine.stats))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its type stubs
        self._health_changed = asyncio.Event()
        self._withdrawn = False  # health says NOT_SERVING whatever the engine does
        self._terminate = asyncio.Event()
        self._over: asyncio.Future[int] | None = None
        self._loop_seen = time.monotonic()
        self._grace_s = STOP_GRACE_S
        self.port = 0
        self.metrics_port: int | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Serve until told to end, or until the engine or the supervisor is gone; returns the exit code.

        Raises:
            ConfigError: a port is in use.
        """
        self._over = asyncio.get_running_loop().create_future()
        with self._http_endpoint(), self._engine_client(), self._supervisor():
            async with self._grpc_server(), asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(self._announce()),
                    tasks.create_task(self._publish_health()),
                    tasks.create_task(self._measure_lag()),
                    tasks.create_task(self._gateways.answer_others()),
                ]
                code = await self._serve(self._over)
                for task in background:
                    task.cancel()
            self._tell_figures(last=True)
        return code

    async def _serve(self, over: asyncio.Future[int]) -> int:
        """Wait for the reason to end, and drain if there is time."""
        life = asyncio.create_task(self._live())
        try:
            await asyncio.wait((over, life), return_when=asyncio.FIRST_COMPLETED)
        finally:
            life.cancel()
        if self._engine.state is EngineState.DEAD:
            await self._calls.wait_idle(LAST_WORDS_S)
        return over.result() if over.done() else EXIT_DONE

    async def _live(self) -> None:
        await self._terminate.wait()
        await self._drain()

    async def _drain(self) -> None:
        """Be withdrawn, then refuse, then wait for those that run."""
        logger.info("draining streams=%d", len(self._calls))
        self._withdraw()
        await asyncio.sleep(self._config.withdrawal_s)
        self._admission.drain()
        if not await self._calls.wait_idle(self._config.drain_timeout_s):
            logger.warning("drain timed out streams=%d", len(self._calls))
            self._calls.end_all(DrainingError("the server ended before this request did"))

    def end_gracefully(self) -> None:
        """Drain, then end."""
        self._terminate.set()

    def _close_door(self) -> None:
        """An administrator drains: refuse at once, but go on living."""
        self._withdraw()
        self._admission.drain()

    def _withdraw(self) -> None:
        self._withdrawn = True
        self._health_changed.set()

    def _end(self, code: int, *, at_once: bool = False) -> None:
        if at_once:
            self._grace_s = 0.0
        if self._over is not None and not self._over.done():
            self._over.set_result(code)

    # -- what it holds open --------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _grpc_server(self) -> AsyncIterator[None]:
        interceptors: list[grpc.aio.ServerInterceptor] = [StatusInterceptor(self._metrics.call_ended)]  # type: ignore[type-arg]
        if self._authenticator.wants_tokens:
            interceptors.insert(0, AuthInterceptor(self._authenticator, self._metrics.call_ended))
        server = grpc.aio.server(interceptors=interceptors, options=server_options(self._config))
        self._register(server)
        credentials = self._certificate.credentials() if self._certificate is not None else None
        self.port = bind(server, self._config.host, self._config.port, "--port", credentials)
        await self._health_set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        try:
            yield
        finally:
            await server.stop(self._grace_s)
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _register(self, server: grpc.aio.Server) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(
                config=self._config,
                engine=self._engine,
                rules=self._rules,
                codec=self._codec,
                admission=self._admission,
                calls=self._calls,
                metrics=self._metrics,
                identify=self._authenticator.identity,
            ),
            server,
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(
                config=self._config, card=self._card, rules=self._rules, codec=self._codec, engine=self._engine
            ),
            server,
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(
                engine=self._engine,
                admission=self._admission,
                gateways=self._gateways,
            ),
            server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.reflection:
            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection((*SERVICE_NAMES, health_name, reflection.SERVICE_NAME), server)

    @contextlib.contextmanager
    def _http_endpoint(self) -> Iterator[None]:
        config = self._config
        if config.metrics_port < 0 or self._number > 0:
            yield
            return
        try:
            endpoint = HttpEndpoint(config.metrics_host, config.metrics_port, self._metrics.registry, self._problem)
        except OSError as error:
            raise cannot_listen(error, config.metrics_host, config.metrics_port, "--metrics-port") from error
        self.metrics_port = endpoint.port
        try:
            yield
        finally:
            endpoint.close()

    @contextlib.contextmanager
    def _engine_client(self) -> Iterator[None]:
        self._engine.open()
        try:
            yield
        finally:
            self._engine.close()

    @contextlib.contextmanager
    def _supervisor(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control.fileno(), self._on_control)
        try:
            yield
        finally:
            loop.remove_reader(self._control.fileno())

    # -- what it hears -------------------------------------------------------------------------------------------------

    def _on_control(self) -> None:
        message = self._control.receive()
        if isinstance(message, Drain):
            self.end_gracefully()
        elif isinstance(message, Stop):
            self._end(EXIT_DONE, at_once=True)
        elif isinstance(message, EngineLost):
            logger.warning("engine lost: %s", message.reason)
            self._engine.engine_lost(message.epoch, message.reason)
        elif isinstance(message, EngineDead):
            logger.error("engine dead: %s", message.reason)
            self._engine.engine_dead(message.reason)
            self._end(EXIT_LOST)
        elif isinstance(message, Ask | Answer | Figures):
            self._gateways.hear(message)
            if isinstance(message, Figures):
                self._metrics.take(message.gateway, message.counted)
        else:
            logger.error("the supervisor is gone")
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._end(EXIT_LOST, at_once=True)

    def _on_state(self, state: EngineState) -> None:
        logger.info("engine state=%s", state.value)
        self._metrics.engine_state(state, self._engine.info)
        self._health_changed.set()

    def _on_stats(self, stats: EngineStats) -> None:
        if self._engine.info is not None:
            self._metrics.engine_stats(stats, self._engine.info.epoch)

    # -- what it tells -------------------------------------------------------------------------------------------------

    async def _announce(self) -> None:
        """Tell the supervisor, once, that requests are taken."""
        with contextlib.suppress(EngineUnavailableError):  # it died first; the supervisor told us so
            info = await self._engine.wait_ready()
            facts: dict[str, str | int | float] = {
                "address": host_port(self._config.host, self.port),
                "model": self._card.name,
                "tensor_parallel_size": info.tensor_parallel_size,
                "device": info.device,
                "dtype": info.dtype,
                "kv_blocks": info.num_blocks,
                "block_size": info.block_size,
                "max_model_len": info.max_model_len,
            }
            if self._certificate is not None:
                facts["tls"] = "mutual" if self._certificate.is_mutual else "on"
            if self._config.gateways > 1:
                facts["gateways"] = self._config.gateways
            if self.metrics_port is not None:
                facts["metrics"] = f"http://{host_port(self._config.metrics_host, self.metrics_port)}/metrics"
            self._control.send(Up(facts))

    async def _publish_health(self) -> None:
        """Keep grpc.health.v1 true: SERVING while the engine is ready and nobody drains. The health port follows."""
        while True:
            serving = self._engine.state is EngineState.READY and not self._withdrawn
            self._control.send(Serving(serving))
            status = health_pb2.HealthCheckResponse
            await self._health_set(status.SERVING if serving else status.NOT_SERVING)
            await self._health_changed.wait()
            self._health_changed.clear()

    async def _health_set(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, status)

    async def _measure_lag(self) -> None:
        """Tell how late the loop is, the supervisor that it turns, and gateway 0 what has been counted."""
        next_beat = 0.0
        while True:
            began = time.monotonic()
            if began >= next_beat:
                next_beat = began + BEAT_PERIOD_S
                self._control.send(Heartbeat(self._engine.stats.step, STALLED_S))
                self._tell_figures()
            await asyncio.sleep(LAG_PERIOD_S)
            self._loop_seen = time.monotonic()
            self._metrics.loop_lag(max(0.0, self._loop_seen - began - LAG_PERIOD_S))

    def _tell_figures(self, *, last: bool = False) -> None:
        if self._number > 0 and self._config.metrics_port >= 0:
            self._gateways.tell_figures(self._metrics.counted(), last=last)

    def _problem(self) -> str | None:
        """For /healthz, on the HTTP thread."""
        if self._engine.state is EngineState.DEAD:
            return "the engine is dead"
        late = time.monotonic() - self._loop_seen
        return f"the event loop is {late:.0f} s late" if late > STALLED_S else self._gateways.problem


def _certificate(config: ServeConfig) -> ServerCertificate | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerCertificate(config.tls_cert, config.tls_key, config.tls_client_ca)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host.strip("[]") == "::1"
