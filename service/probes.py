"""The health port: plaintext grpc.health.v1 for kubelets and other probers, apart from the port that serves.

It runs on threads of the supervisor's process, on every node, and asks `Vitals`: a gateway whose event loop is busy, or
stuck, or not there yet, delays no answer. It tells nothing but a status, so it needs neither TLS nor a token. `Check`
only: clients that want to `Watch` do so on the serving port.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.ports import bind
from worker.vitals import Vitals

READINESS, LIVENESS, STARTUP = "readiness", "liveness", "startup"

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_connection_idle_ms", 300_000),
)


class ProbeServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """Answers with what is so at the moment of the question."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse
        good = self._is_good(request.service)
        if good is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return status()
        return status(status=status.SERVING if good else status.NOT_SERVING)

    def _is_good(self, service: str) -> bool | None:
        if service in ("", READINESS):
            return self._vitals.is_ready
        if service == LIVENESS:
            return self._vitals.problem is None
        if service == STARTUP:
            return self._vitals.was_ready
        return None


@contextmanager
def probe_endpoint(host: str, port: int, vitals: Vitals) -> Iterator[int]:
    """Answer probes meanwhile; gives the port.

    Raises:
        ConfigError: the port is in use.
    """
    pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="probes")
    server: Any = grpc.server(pool, options=_OPTIONS, maximum_concurrent_rpcs=64)
    health_pb2_grpc.add_HealthServicer_to_server(ProbeServicer(vitals), server)
    port = bind(server, host, port, "--health-port")
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=None).wait()
        pool.shutdown()
