"""A real server under load, scraped by a real Prometheus: every expression of the chart is asked, and has an answer.

What other exporters would tell stands in other_exporters.txt, in their own format, and is scraped from a file server.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from lightqwen.client import Client, Generation, LightqwenError
from service.terminal import read_ready_line
from tests.observability.conftest import Promtool, find_tool
from tests.observability.expressions import (
    RULES,
    Expression,
    annotation_expressions,
    load_dashboards,
    load_rules,
    panel_expressions,
    rule_expressions,
)

pytestmark = [pytest.mark.timeout(150), pytest.mark.slow]

# Three are computed at a time, two wait, others are refused. The KV cache has not room for the whole of three.
SMALL = ["--block-size", "16", "--num-blocks", "24", "--max-model-len", "320"]
RUNNING = 3
CROWDED = ["--max-running", str(RUNNING), "--max-queued-requests", "2"]
TARGET_LABELS = {"namespace": "ai", "pod": "lightqwen-0", "release": "demo"}


@dataclass
class Prometheus:
    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """One call of the HTTP API; fails the test with what Prometheus says."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{parameters}: {error.read().decode()}")

    def query(self, expr: str) -> list[dict[str, Any]]:
        data = self.ask("query", query=expr)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def value(self, expr: str) -> float:
        """Of an expression with one series or none (0)."""
        result = self.query(expr)
        assert len(result) <= 1
        return float(result[0]["value"][1]) if result else 0.0


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    metrics: str
    health: str
    model: str


# ---- what runs -------------------------------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended by SIGTERM at the latest when the block ends."""
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s: {what}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def server() -> Iterator[Server]:
    find_tool("prometheus")
    command = [sys.executable, "-m", "service.cli", "serve", "--device", "cpu", "--log-level", "error"]
    ports = ["--port", "0", "--metrics-port", "0", "--health-port", "0"]
    with running([*command, *ports, *SMALL, *CROWDED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        facts = read_ready_line(process.stdout.readline())
        assert facts is not None
        yield Server(process, facts["address"], facts["metrics"], facts["health"], facts["model"])
        process.stdout.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def other_exporters() -> Iterator[str]:
    """Address of a server of what kube-state-metrics and dcgm-exporter would say."""
    handler = functools.partial(_Quiet, directory=str(Path(__file__).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


@pytest.fixture
def prometheus(server: Server, other_exporters: str, tmp_path: Path) -> Iterator[Prometheus]:
    target = urllib.parse.urlsplit(server.metrics).netloc
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in RULES],
        "scrape_configs": [
            {"job_name": "lightqwen", "static_configs": [{"targets": [target], "labels": TARGET_LABELS}]},
            {
                "job_name": "other-exporters",
                "metrics_path": "/other_exporters.txt",
                "honor_labels": True,
                "static_configs": [{"targets": [other_exporters]}],
            },
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        find_tool("prometheus"),
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    with (tmp_path / "log").open("w") as log, running(command, stderr=log):
        eventually(lambda: _is_ready(prometheus.url), "Prometheus is ready")
        eventually(lambda: prometheus.value('sum(up{job="lightqwen"})') == 1, "the server is scraped")
        yield prometheus


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def loaded(server: Server, prometheus: Prometheus) -> Prometheus:
    """After streams, cancels, refusals and nonsense, and some scrapes of each."""
    for _ in range(2):  # so that rates see a rise between two scrapes
        _load(server.address)
        time.sleep(2.5)
    eventually(lambda: prometheus.value("lightqwen_preemptions_total") > 0, "preemptions were scraped")
    eventually(lambda: prometheus.value("sum(lightqwen_cancel_to_free_seconds_count)") > 0, "cancels were scraped")
    names = {rule["record"] for rule in load_rules() if "record" in rule}
    eventually(lambda: names <= set(prometheus.ask("label/__name__/values")), "recording rules have results")
    return prometheus


def _load(address: str) -> None:
    prompt = "Once upon a time there was a server. "
    with Client(address) as client:
        calls = []
        for n in range(16):
            calls.append(client.generate(prompt * (1 + n % 3), max_tokens=160, ignore_eos=True, timeout=60))
            if n < RUNNING:
                next(iter(calls[n]))  # it has started: as many as may run do, for whom there are not enough blocks
        refused = [_is_refused(call) for call in calls]
        assert any(refused)
        assert not all(refused)
        with client.generate("Once upon a time", max_tokens=250, ignore_eos=True, timeout=60) as given_up:
            next(given_up.pieces())
        with pytest.raises(LightqwenError) as wrong:
            client.generate("Once upon a time", top_p=7).text()
        assert wrong.value.code is grpc.StatusCode.INVALID_ARGUMENT
        client.tokenize("Once upon a time")
        client.model()


def _is_refused(call: Generation) -> bool:
    """Read a call to its end."""
    try:
        call.text()
    except LightqwenError as error:
        if error.reason == "QUEUE_FULL":
            return True
        raise
    return False


# ---- what must hold --------------------------------------------------------------------------------------------------


def test_a_real_server_answers_every_expression(server: Server, loaded: Prometheus, promtool: Promtool) -> None:
    """One test, for it is one server; what follows is in the order in which it must happen."""
    promtool_likes_the_metrics(promtool, server)
    every_metric_of_an_expression_exists(loaded)
    every_panel_has_data(loaded)
    every_recording_rule_has_data(loaded)
    every_selector_of_an_alert_finds_series(loaded)
    prometheus_evaluates_every_rule_without_an_error(loaded)
    the_variables_offer_what_there_is(server, loaded)
    legends_name_labels_that_the_series_have(loaded)
    numbers_are_those_of_the_load(loaded)
    only_what_should_alert_does(loaded)
    the_images_health_check_says_yes(server)
    a_server_that_ends_is_noticed(server, loaded)


def has_data(result: list[dict[str, Any]]) -> bool:
    return any(sample["value"][1] != "NaN" for sample in result)


def promtool_likes_the_metrics(promtool: Promtool, server: Server) -> None:
    with urllib.request.urlopen(server.metrics, timeout=5) as answer:
        done = promtool("check", "metrics", stdin=answer.read().decode())
    assert done.returncode == 0, done.stdout + done.stderr


def every_metric_of_an_expression_exists(loaded: Prometheus) -> None:
    there = set(loaded.ask("label/__name__/values"))
    every = panel_expressions() + annotation_expressions() + rule_expressions("alert") + rule_expressions("record")
    assert len(every) > 150
    for expression in every:
        missing = expression.metrics() - there
        assert not missing, (expression.where, missing)


def every_panel_has_data(loaded: Prometheus) -> None:
    empty = [e.where for e in panel_expressions() if not has_data(loaded.query(e.text))]
    assert not empty


def every_recording_rule_has_data(loaded: Prometheus) -> None:
    for rule in load_rules():
        if "record" in rule:
            assert has_data(loaded.query(rule["record"])), rule["record"]
            assert has_data(loaded.query(rule["expr"])), rule["record"]


def every_selector_of_an_alert_finds_series(loaded: Prometheus) -> None:
    """An alert that is silent because of a misspelt label would look just as healthy."""

    def check(expression: Expression) -> None:
        loaded.query(expression.text)
        for selector in expression.selectors():
            assert loaded.query(f"count({selector.prettify()})"), (expression.where, selector.prettify())

    for expression in rule_expressions("alert") + annotation_expressions():
        check(expression)


def prometheus_evaluates_every_rule_without_an_error(loaded: Prometheus) -> None:
    groups = loaded.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(load_rules())
    for rule in rules:
        assert rule["health"] == "ok", (rule["name"], rule.get("lastError"))


def the_variables_offer_what_there_is(server: Server, loaded: Prometheus) -> None:
    expected = {"model": server.model, "namespace": "ai", "pod": "lightqwen-0"}
    for name, dashboard in load_dashboards().items():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match is not None, name
            selector = re.sub(r"\$\w+", ".*", match.group(1))
            values = loaded.ask(f"label/{match.group(2)}/values", **{"match[]": selector})
            assert values == [expected[variable["name"]]], (name, variable["name"])


def legends_name_labels_that_the_series_have(loaded: Prometheus) -> None:
    texts = {expression.where: expression.text for expression in panel_expressions()}
    for name, dashboard in load_dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                where = f"{name} / {panel['title']} / {target['refId']}"
                labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                for sample in loaded.query(texts[where]):
                    assert labels <= set(sample["metric"]), where


def numbers_are_those_of_the_load(loaded: Prometheus) -> None:
    """Spot checks against what the load did: an expression may have data and still be wrong."""
    by_where = {e.where: e.text for e in panel_expressions()}
    assert loaded.value(by_where["overview / Servers ready / A"]) == 1
    assert loaded.value(by_where["overview / Servers unreachable / A"]) == 0
    assert loaded.value(by_where["ranks / Ranks up / A"]) == 1
    assert loaded.value(by_where["ranks / Restarts of ranks / A"]) == 0
    well = loaded.value(by_where["overview / Calls that ended well / A"])
    assert 0 < well < 1  # some were refused
    early = loaded.value(by_where["overview / First tokens within 2.5 s / A"])
    assert 0 <= early <= 1
    assert loaded.value('lightqwen_grpc_requests_total{method="Generate", code="INVALID_ARGUMENT"}') == 2
    refused = loaded.value('lightqwen_admission_rejections_total{reason="QUEUE_FULL"}')
    assert refused == loaded.value('lightqwen_grpc_requests_total{method="Generate", code="RESOURCE_EXHAUSTED"}') > 0
    assert loaded.value("sum(lightqwen_cancelled_total)") == 2


def only_what_should_alert_does(loaded: Prometheus) -> None:
    """The server is well enough. What stands in other_exporters.txt never changes, so it is no news either."""
    active = {alert["labels"]["alertname"] for alert in loaded.ask("alerts")["alerts"] if alert["state"] == "firing"}
    assert active == set()


def _health_check(server: Server, *arguments: str) -> tuple[int, str]:
    """What the image's health check says of the server."""
    script = Path(__file__).parents[2] / "deploy" / "healthcheck.py"
    environment = {**os.environ, "LIGHTQWEN_HEALTH_PORT": server.health.rpartition(":")[2]}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout


def the_images_health_check_says_yes(server: Server) -> None:
    for arguments in ([], ["liveness"], ["startup"]):
        code, said = _health_check(server, *arguments)
        assert (code, said.split()[-1]) == (0, "SERVING")


def a_server_that_ends_is_noticed(server: Server, loaded: Prometheus) -> None:
    """With the real `up` and real target labels, both alerts begin to wait for their time."""
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert _health_check(server)[0] == 1

    def pending() -> set[str]:
        return {alert["labels"]["alertname"] for alert in loaded.ask("alerts")["alerts"]}

    eventually(lambda: {"LightqwenServerDown", "LightqwenServiceDown"} <= pending(), "alerts are pending")
    (down,) = (a for a in loaded.ask("alerts")["alerts"] if a["labels"]["alertname"] == "LightqwenServerDown")
    assert {name: down["labels"][name] for name in TARGET_LABELS} == TARGET_LABELS
    assert down["annotations"]["summary"] == "lightqwen server ai/lightqwen-0 is down"
