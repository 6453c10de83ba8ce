"""The chart and the server together: what a pod of the CPU demo would run is run here, as the rendered objects say.

There is no kubelet: this file asks the probes, runs the pod of `helm test`, and ends the pod, as a kubelet would.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightqwen.client import Client
from tests.helm.chart import CHART, NAMESPACE, RELEASE, SCENARIOS, Object, Rendered, flags, helm, render
from tests.helm.fake_api import fake_api

SERVING = health_pb2.HealthCheckResponse.SERVING
STREAMS = 6
SCRIPTS = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def small(ports: list[int]) -> dict[str, Any]:
    """One rank, ports of this machine, and a drain that a test can wait for."""
    return {
        "engine.tensorParallelSize": 1,
        "ports": dict(zip(("grpc", "health", "metrics"), ports, strict=True)),
        "lifecycle.withdrawalSeconds": 2,
        "lifecycle.drainSeconds": 40,
    }


@contextmanager
def container(
    spec: Object, places: dict[str, Path], log: Path, more: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a container's command with its own environment, its mounts being folders of this machine.

    `more`: what a controller adds to the environment.
    """
    told = environment(spec, places) | (more or {})
    with log.open("wb") as output:
        process = subprocess.Popen(here(spec["command"], places), env=told, stdout=output, stderr=output)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait(10)


def here(command: list[str], places: dict[str, Path]) -> list[str]:
    return [str(SCRIPTS / command[0]), *(moved(word, places) for word in command[1:])]


def environment(spec: Object, places: dict[str, Path]) -> dict[str, str]:
    told = {variable["name"]: moved(variable["value"], places) for variable in spec["env"] if "value" in variable}
    ours = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}  # the code that is under test
    return {**ours, "OMP_NUM_THREADS": "1", **told}


def moved(text: str, places: dict[str, Path]) -> str:
    for mount, folder in places.items():
        if text == mount or text.startswith(f"{mount}/"):
            return f"{folder}{text.removeprefix(mount)}"
    return text


def probe(spec: Object, name: str) -> bool:
    """As the kubelet asks: plaintext, the probe's own port, service and timeout."""
    told = spec[f"{name}Probe"]
    with grpc.insecure_channel(f"127.0.0.1:{told['grpc']['port']}") as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=told["grpc"]["service"])
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=told["timeoutSeconds"])
        except grpc.RpcError:
            return False
    return bool(answer.status == SERVING)


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def test_a_pod_serves_is_tested_and_drains(tmp_path: Path) -> None:
    ports = free_ports(3)
    rendered = render(SCENARIOS["cpu-demo"], values=small(ports))
    places, log = volumes(rendered, tmp_path), tmp_path / "log"
    with container(rendered.server, places, log) as server:
        wait_until(lambda: probe(rendered.server, "startup"), 40, log.read_text)
        assert probe(rendered.server, "readiness")
        assert probe(rendered.server, "liveness")
        helm_test_succeeds(ports, places, tmp_path)
        a_drain_loses_no_stream(rendered, server, ports[0], tokens=600)
    assert not list((tmp_path / "tmp").iterdir()), "a server that ended leaves nothing in /tmp"


def volumes(rendered: Rendered, folder: Path) -> dict[str, Path]:
    """A pod's mounts as folders below this one, the configuration in it."""
    places = {"/etc/lightqwen/config": folder / "config", "/cache": folder / "cache", "/tmp": folder / "tmp"}
    for place in places.values():
        place.mkdir(parents=True)
    (folder / "config" / "server.toml").write_text(rendered.config_text)
    return places


@pytest.mark.timeout(120)
def test_a_group_of_pods_serves_and_drains_when_one_must_go(tmp_path: Path) -> None:
    """Two pods of a LeaderWorkerSet, with the environment that its controller gives: the worker's node is drained."""
    meeting, *ports = free_ports(7)
    spread = {"engine.nodes": 2, "engine.tensorParallelSize": 2, "ports.leader": meeting}
    # On one machine two pods need ports of their own; all the rest is the same.
    leader = render(SCENARIOS["cpu-demo"], values=small(ports[:3]) | spread)
    worker = render(SCENARIOS["cpu-demo"], values=small(ports[3:]) | spread)
    group = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "localhost"}
    logs = [tmp_path / "leader.log", tmp_path / "worker.log"]

    def said() -> str:
        return "\n".join(log.read_text() for log in logs)

    with (
        container(
            worker.server, volumes(worker, tmp_path / "worker"), logs[1], group | {"LWS_WORKER_INDEX": "1"}
        ) as other,
        container(
            leader.server, volumes(leader, tmp_path / "leader"), logs[0], group | {"LWS_WORKER_INDEX": "0"}
        ) as first,
    ):
        for pod in (leader, worker):
            wait_until(lambda pod=pod: probe(pod.server, "startup"), 45, said)  # type: ignore[misc]
            assert probe(pod.server, "readiness")
            assert probe(pod.server, "liveness")
        a_drain_loses_no_stream(leader, first, ports[0], tokens=150, asked=other)
        assert other.wait(20) == 0, said()


def helm_test_succeeds(ports: list[int], places: dict[str, Path], home: Path) -> None:
    """helm installs, and the pod of `helm test` is run for real, against the server that runs."""
    answers: list[str] = []

    def kubelet(pod: Object) -> str:
        (spec,) = pod["spec"]["containers"]
        command = here(spec["command"], places)
        target = f"{RELEASE}-lightqwen.{NAMESPACE}.svc:{ports[0]}"
        command[command.index(target)] = f"127.0.0.1:{ports[0]}"  # what the cluster's DNS would do
        done = subprocess.run(
            command, env=environment(spec, places), capture_output=True, text=True, timeout=30, check=False
        )
        answers.append(done.stdout + done.stderr)
        return "Succeeded" if done.returncode == 0 else "Failed"

    with fake_api(kubelet) as api:
        where = ["--kube-apiserver", api.url, "--namespace", NAMESPACE]
        values = ["--values", SCENARIOS["cpu-demo"], *flags(small(ports))]
        helm("install", RELEASE, CHART, "--create-namespace", *where, *values, home=home)
        done = helm("test", RELEASE, *where, home=home, check=False)
    assert done.returncode == 0, answers
    assert len(answers) == 1
    assert "8 output tokens" in answers[0]


def a_drain_loses_no_stream(
    rendered: Rendered,
    server: subprocess.Popen[bytes],
    port: int,
    tokens: int,
    asked: subprocess.Popen[bytes] | None = None,
) -> None:
    """SIGTERM while streams run: readiness goes, new calls are still taken for a while, every stream ends well.

    `asked`: who gets the signal first, if not the server itself.
    """
    running = threading.Barrier(STREAMS + 1, timeout=30)

    def stream(client: Client) -> int:
        generation = client.generate("Once upon a time", max_tokens=tokens, min_tokens=tokens, temperature=1.0)
        for index, _ in enumerate(generation.pieces()):
            if index == 0:
                running.wait()
        assert generation.finished is not None
        return int(generation.finished.usage.output_tokens)

    with Client(f"127.0.0.1:{port}") as client, ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(stream, client) for _ in range(STREAMS)]
        running.wait()
        began = time.monotonic()
        (asked or server).send_signal(signal.SIGTERM)
        assert not any(each.done() for each in streams), "streams run when the signal comes"
        wait_until(lambda: not probe(rendered.server, "readiness"), 5, lambda: "readiness stays after SIGTERM")
        assert probe(rendered.server, "liveness"), "a draining pod must not be restarted"
        if asked is not None:
            server.send_signal(signal.SIGTERM)  # the controller lets the whole group go
        late = client.generate("A late call", max_tokens=4, min_tokens=4)
        assert late.text() is not None
        assert [each.result(50) for each in streams] == [tokens] * STREAMS
    assert server.wait(50) == 0
    grace = rendered.template["spec"]["terminationGracePeriodSeconds"]
    pre_stop = rendered.server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert time.monotonic() - began < grace - pre_stop, "the kubelet would have killed it"


def test_the_configuration_is_what_the_container_reads() -> None:
    """The file that the command names is the key of the ConfigMap, mounted where the command looks."""
    rendered = render(SCENARIOS["cpu-demo"])
    *_, option, path = rendered.server["command"]
    mounts = {mount["name"]: mount["mountPath"] for mount in rendered.server["volumeMounts"]}
    assert (option, path) == ("--config", f"{mounts['config']}/server.toml")
    config_map = rendered.template_volume("config")["configMap"]["name"]
    assert list(rendered.one("ConfigMap", config_map)["data"]) == ["server.toml"]
