"""The health port: its names, and that it answers whatever hangs. The last test has a whole server behind it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightqwen.client import Client
from service.probes import LIVENESS, READINESS, STARTUP, probe_endpoint
from tests.processes import Serve, until
from worker.config import ConfigError
from worker.vitals import Pulse, Vitals

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Prober:
    """What a kubelet does."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self._stub = health_pb2_grpc.HealthStub(self.channel)

    def check(self, service: str = "", timeout: float = 5.0) -> int:
        response = self._stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        return int(response.status)

    @property
    def is_there(self) -> bool:
        try:
            return bool(self.check())
        except grpc.RpcError:
            return False

    def all(self) -> dict[str, int]:
        return {name: self.check(name) for name in ("", READINESS, LIVENESS, STARTUP)}


@pytest.fixture
def vitals() -> Vitals:
    return Vitals()


@pytest.fixture
def prober(vitals: Vitals) -> Iterator[Prober]:
    with probe_endpoint("127.0.0.1", 0, vitals) as port:
        prober = Prober(f"127.0.0.1:{port}")
        yield prober
        prober.channel.close()


def test_the_names_follow_the_vitals(vitals: Vitals, prober: Prober) -> None:
    assert prober.all() == {"": NOT_SERVING, READINESS: NOT_SERVING, LIVENESS: SERVING, STARTUP: NOT_SERVING}
    vitals.turn(takes_requests=True, pulses=[])
    assert prober.all() == dict.fromkeys(("", READINESS, LIVENESS, STARTUP), SERVING)
    vitals.turn(takes_requests=False, pulses=[])
    assert prober.all() == {"": NOT_SERVING, READINESS: NOT_SERVING, LIVENESS: SERVING, STARTUP: SERVING}
    vitals.turn(takes_requests=True, pulses=[Pulse("rank0", time.monotonic() - 5.0, 3.0)])
    assert prober.all() == {"": NOT_SERVING, READINESS: NOT_SERVING, LIVENESS: NOT_SERVING, STARTUP: SERVING}


def test_another_name_is_not_found(prober: Prober) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        prober.check("lightqwen.v1.GenerationService")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_port_in_use_is_one_readable_line(vitals: Vitals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use; choose another with --health-port"),
            probe_endpoint("127.0.0.1", port, vitals),
        ):
            pass


# ---- with a whole server behind it -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_probes_are_answered_from_the_start_under_a_stuck_gateway_and_while_it_drains() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Serve.start("--port", "0", "--health-port", str(port), "--withdrawal-s", "2")
    prober = Prober(f"127.0.0.1:{port}")
    try:
        until(lambda: prober.is_there, 30.0, "no probe is answered")
        assert prober.all() == {"": NOT_SERVING, READINESS: NOT_SERVING, LIVENESS: SERVING, STARTUP: NOT_SERVING}
        assert server.wait_ready()["health"] == f"127.0.0.1:{port}"
        until(lambda: prober.check(READINESS) == SERVING, 5.0, "not ready")
        assert prober.check(STARTUP) == SERVING

        gateway = server.workers[0]
        os.kill(gateway, signal.SIGSTOP)
        began = time.monotonic()
        while prober.check(LIVENESS, timeout=1.0) == SERVING:  # an answer comes within a second all the time
            assert time.monotonic() - began < 20.0
            time.sleep(0.2)
        assert time.monotonic() - began > 5.0
        assert prober.check(READINESS) == NOT_SERVING
        os.kill(gateway, signal.SIGCONT)
        until(lambda: prober.check(LIVENESS) == SERVING, 5.0, "it does not recover")
        until(lambda: prober.check(READINESS) == SERVING, 5.0, "it does not recover")

        server.process.terminate()
        until(lambda: prober.check(READINESS) == NOT_SERVING, 1.5, "draining is not seen")
        assert prober.check(LIVENESS) == SERVING
        with Client(server.address) as client:  # withdrawn, yet what comes is still taken
            assert client.generate([300], max_tokens=2, text=False, timeout=10).text() == ""
        assert server.exit_code(30) == 0
    finally:
        prober.channel.close()
        server.close()
