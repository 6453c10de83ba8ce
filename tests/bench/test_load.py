"""`lightqwen bench` as a process, against a real gRPC server that streams at known times."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from tests.bench.scripted_server import CONTEXT_LENGTH, VOCAB_SIZE, ScriptedServer
from tests.processes import LIGHTQWEN, children, until

SLACK_S = 0.5
"""What a busy machine may add to a time; what the server waits nothing can take away."""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def bench(target: str, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*LIGHTQWEN, "bench", "--target", target, *map(str, options)]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=env, stdin=subprocess.DEVNULL)


def measure(server: ScriptedServer, folder: Path, *options: str | Path, code: int = 0) -> dict[str, Any]:
    """The JSON result of a run without warm-up, with details."""
    file = folder / "result.json"
    done = bench(server.target, "--warmup", "0", "--json", file, "--details", *options)
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    return result


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_figures_are_the_times_of_the_server(server: ScriptedServer, tmp_path: Path) -> None:
    server.chunks = ((0.2, 1), (0.05, 1), (0.15, 4))
    result = measure(server, tmp_path, "--num-requests", "12", "--concurrency", "4", "--goodput", "ttft:150")
    assert (result["sent"], result["completed"], result["failed"]) == (12, 12, {})
    for name, ms in {"ttft": 200, "e2el": 400}.items():
        assert result[name]["min"] >= ms - 1, name
    for name, ms in {"ttft": 200, "itl": 150, "tpot": 40, "e2el": 400}.items():
        assert result[name]["p50"] <= ms + SLACK_S * 1000, name
    # A gap has no lower bound: the chunk before it may have come late. What all gaps of an answer add up to is fixed.
    after_first = result["e2el"]["mean"] - result["ttft"]["mean"]
    assert 2 * result["itl"]["mean"] == pytest.approx(after_first, rel=1e-3)
    assert 5 * result["tpot"]["mean"] == pytest.approx(after_first, rel=1e-3)
    assert result["itl"]["count"] == 24
    assert result["output_tokens"] == 72
    assert (result["prompt_tokens"], result["cached_tokens"]) == (12 * 128, 24)
    assert result["duration_s"] >= 3 * 0.4 - 0.01, "three rounds of four"
    assert result["output_tokens_per_s"] == pytest.approx(72 / result["duration_s"])
    assert result["requests_per_s"] == pytest.approx(12 / result["duration_s"])
    assert result["goodput"]["requests"] == 0
    assert result["finish_reasons"] == {"MAX_TOKENS": 12}


def test_concurrency_is_kept_over_all_processes(server: ScriptedServer, tmp_path: Path) -> None:
    server.chunks = ((0.05, 1),)
    result = measure(server, tmp_path, "--num-requests", "40", "--concurrency", "5", "--processes", "2")
    assert server.most_running == 5
    assert result["peak_running"] <= 5
    assert result["client"]["processes"] == 2
    assert len({tuple(request.prompt.token_ids.ids) for request in server.requests}) == 40, "each was sent once"


def test_connections_share_the_calls(server: ScriptedServer, tmp_path: Path) -> None:
    load = ["--num-requests", "40", "--concurrency", "10", "--processes", "2", "--warmup", "0"]
    result = measure(server, tmp_path, *load, "--connections", "5")
    calls = Counter(server.peers)
    assert sorted(calls.values()) == [6, 7, 7, 10, 10], "three connections of one process, two of the other"
    assert result["client"]["connections"] == 5
    server.peers.clear()
    assert measure(server, tmp_path, *load)["client"]["connections"] == len(set(server.peers)) == 2


def test_all_at_once_is_the_default(server: ScriptedServer, tmp_path: Path) -> None:
    server.chunks = ((1.5, 1),)
    measure(server, tmp_path, "--num-requests", "30")
    assert server.most_running == 30


def test_rate_is_kept(server: ScriptedServer, tmp_path: Path) -> None:
    server.chunks = ((0.3, 1),)
    measure(server, tmp_path, "--num-requests", "40", "--request-rate", "20", "--burstiness", "inf", "--processes", "2")
    arrived = np.sort(server.arrived)
    assert arrived[-1] - arrived[0] == pytest.approx(39 / 20, abs=SLACK_S)
    assert np.median(np.diff(arrived)) == pytest.approx(1 / 20, abs=0.03)


def test_trace_is_sent_at_its_times(server: ScriptedServer, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 100, "prompt": "One", "output_length": 3},
        {"timestamp": 1100, "messages": [{"role": "user", "content": "Two"}], "output_length": 4},
        {"timestamp": 2600, "input_length": 9, "output_length": 5},
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measure(server, tmp_path, "--trace", tmp_path / "trace.jsonl", "--time-scale", "0.001", "--processes", "1")
    assert np.diff(server.arrived) == pytest.approx([1.0, 1.5], abs=SLACK_S)
    text, chat, lengths = server.requests
    assert (text.prompt.text, text.stopping.max_tokens, text.stopping.ignore_eos) == ("One", 3, False)
    assert [message.content for message in chat.prompt.chat.messages] == ["Two"]
    assert (len(lengths.prompt.token_ids.ids), lengths.stopping.ignore_eos) == (9, True)
    assert not any(request.cache.bypass_prefix_cache for request in server.requests)


def test_requests_are_made_as_asked(server: ScriptedServer, tmp_path: Path) -> None:
    sampling = ["--temperature", "0.6", "--top-p", "0.9", "--top-k", "20", "--min-p", "0.1", "--seed", "40"]
    measure(server, tmp_path, "--num-requests", "3", "--output-len", "7", *sampling)
    assert sorted(request.sampling.seed for request in server.requests) == [40, 41, 42]
    for request in server.requests:
        assert (request.sampling.temperature, request.sampling.top_p) == (0.6, 0.9)
        assert (request.sampling.top_k, request.sampling.min_p) == (20, 0.1)
        assert (request.stopping.max_tokens, request.stopping.ignore_eos) == (7, True)
        assert request.cache.bypass_prefix_cache
        assert (request.output.text, request.output.token_ids) == (True, False)
        assert max(request.prompt.token_ids.ids) < VOCAB_SIZE
    server.requests.clear()
    switches = ["--no-ignore-eos", "--prefix-cache", "--output", "tokens"]
    measure(server, tmp_path, "--num-requests", "1", *switches)
    (request,) = server.requests
    assert not request.stopping.ignore_eos
    assert not request.cache.bypass_prefix_cache
    assert (request.output.text, request.output.token_ids) == (False, True)
    assert not request.sampling.HasField("temperature"), "the server's default"


def test_server_without_a_tokenizer_is_asked_for_ids(server: ScriptedServer, tmp_path: Path) -> None:
    server.with_tokenizer = False
    measure(server, tmp_path, "--num-requests", "1")
    assert (server.requests[0].output.text, server.requests[0].output.token_ids) == (False, True)


def test_warm_up_is_sent_before_and_not_counted(server: ScriptedServer, tmp_path: Path) -> None:
    done = bench(server.target, "--num-requests", "4", "--warmup", "6", "--prefix-cache", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["sent"] == 4
    assert len(server.requests) == 10
    warmup, measured = server.requests[:6], server.requests[6:]
    assert all(request.cache.bypass_prefix_cache for request in warmup), "it leaves nothing behind"
    assert all(request.stopping.max_tokens == 16 for request in warmup)
    assert not any(request.cache.bypass_prefix_cache for request in measured)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_failures_are_counted_by_status_and_not_tried_again(server: ScriptedServer, tmp_path: Path) -> None:
    server.refuse_every = 3
    result = measure(server, tmp_path, "--num-requests", "12", "--concurrency", "3")
    assert (result["completed"], result["failed"]) == (8, {"RESOURCE_EXHAUSTED": 4})
    assert result["failure_examples"] == {"RESOURCE_EXHAUSTED": "too many requests wait"}
    assert len(server.requests) == 12
    assert result["ttft"]["count"] == 8
    assert bench(server.target, "--num-requests", "6", "--warmup", "0").stdout.count("2 x RESOURCE_EXHAUSTED") == 1


def test_nothing_completed_is_exit_code_1(server: ScriptedServer, tmp_path: Path) -> None:
    server.chunks = ((5.0, 1),)
    result = measure(server, tmp_path, "--num-requests", "3", "--timeout", "0.2", code=1)
    assert result["failed"] == {"DEADLINE_EXCEEDED": 3}
    assert result["ttft"] is None


def test_stream_without_output_is_a_failure(server: ScriptedServer, tmp_path: Path) -> None:
    server.chunks = ()
    result = measure(server, tmp_path, "--num-requests", "2", code=1)
    assert result["failed"] == {"NO_OUTPUT": 2}


def errors(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line."""
    assert done.returncode == 1, done.stdout
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("lightqwen: error: "))
    assert "Traceback" not in done.stderr
    return line


def test_nobody_there_names_the_address_and_the_remedy() -> None:
    line = errors(bench("127.0.0.1:1"))
    assert "127.0.0.1:1: UNAVAILABLE" in line
    assert "lightqwen serve" in line


def test_lengths_that_do_not_fit_are_told_before_anything_is_sent(server: ScriptedServer) -> None:
    line = errors(bench(server.target, "--input-len", str(CONTEXT_LENGTH)))
    assert str(CONTEXT_LENGTH) in line
    assert "--max-model-len" in line
    assert not server.requests


def test_warm_up_that_fails_ends_it_with_what_the_server_said(server: ScriptedServer) -> None:
    server.refuse_all_with = grpc.StatusCode.FAILED_PRECONDITION
    line = errors(bench(server.target))
    assert "--warmup" in line
    assert "FAILED_PRECONDITION: because the test wants it" in line


def test_html_without_matplotlib_names_the_extra(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('no', name='matplotlib')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    line = errors(bench(server.target, "--html", tmp_path / "r.html", PYTHONPATH=path))
    assert "matplotlib is not installed; --html needs: pip install 'lightqwen[bench]'" in line
    assert not server.requests


def test_lost_client_process_is_told(server: ScriptedServer) -> None:
    server.chunks = ((20.0, 1),)
    command = [*LIGHTQWEN, "bench", "--target", server.target, "--num-requests", "4", "--warmup", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: server.running == 4, 20, "requests run")
        client = next(
            pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(client, signal.SIGKILL)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "client process 0 ended with exit code -9" in err
    until(lambda: server.running == 0, 10, "streams end")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def start_in_a_group(*arguments: str | Path) -> subprocess.Popen[str]:
    """As a shell starts it: Ctrl-C reaches all of its processes."""
    command = [*LIGHTQWEN, "bench", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_ctrl_c_reports_what_there_is_and_cancels_what_runs(server: ScriptedServer, tmp_path: Path) -> None:
    server.chunks = ((0.05, 1), (0.05, 2), (30.0, 1))
    load = ["--num-requests", "20", "--concurrency", "6", "--processes", "2", "--warmup", "0"]
    process = start_in_a_group("--target", server.target, *load, "--json", tmp_path / "r.json")
    with process:
        until(lambda: server.running == 6, 20, "requests run")
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 10
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "0 completed, 6 interrupted, 14 not sent" in out
    until(lambda: server.cancelled == 6, 10, "the server hears of it")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["interrupted"]
    assert (result["planned"], result["sent"], result["completed"], result["interrupted_requests"]) == (20, 6, 0, 6)
    assert result["output_tokens"] == 18
    assert result["ttft"]["count"] == 6
    assert result["e2el"] is None


def test_ctrl_c_before_it_measures_ends_it_quietly(server: ScriptedServer) -> None:
    server.chunks = ((30.0, 1),)
    with start_in_a_group("--target", server.target) as process:
        until(lambda: server.running > 0, 20, "warm-up runs")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    until(lambda: server.running == 0, 10, "streams end")


def test_killed_command_leaves_no_client_process_behind(server: ScriptedServer) -> None:
    server.chunks = ((30.0, 1),)
    with start_in_a_group("--target", server.target, "--num-requests", "4", "--warmup", "0") as process:
        until(lambda: server.running == 4, 20, "requests run")
        clients = children(process.pid)
        process.kill()
        process.communicate(timeout=20)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in clients), 10, "clients are left")


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_table_and_progress(server: ScriptedServer) -> None:
    server.chunks = ((0.1, 1), (0.1, 1))
    done = bench(server.target, "--num-requests", "8", "--concurrency", "2", "--goodput", "ttft:9000", "e2el:9000")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{server.target}: scripted <b> on NVIDIA H200, bfloat16, tensor parallel 2, lightqwen 9.8.7"
    assert lines[1] == "8 requests, 128 tokens in, 128 out; 2 in flight"
    assert re.search(r"^requests +8 completed; [\d.]+ s; 2 in flight at most$", done.stdout, re.MULTILINE)
    assert re.search(r"^tokens +1,024 in \(16 cached\), 16 out in 16 chunks$", done.stdout, re.MULTILINE)
    assert re.search(r"^throughput +[\d.]+ requests/s, [\d.]+ output tokens/s", done.stdout, re.MULTILINE)
    assert re.search(
        r"^goodput +[\d.]+ requests/s, 100.0% of all, within ttft 9000 ms, e2el 9000 ms$", done.stdout, re.M
    )
    assert re.search(r"^ms +mean +p50 +p90 +p95 +p99 +max$", done.stdout, re.MULTILINE)
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        assert re.search(rf"^{name}( +[\d.,]+){{6}}$", done.stdout, re.MULTILINE), name
    assert "\x1b" not in done.stderr, "lines, not a changing one: nobody watches"
    assert 1 <= len(done.stderr.splitlines()) <= 4


# ---- what is written -------------------------------------------------------------------------------------------------


def test_json_says_what_made_it(server: ScriptedServer, tmp_path: Path) -> None:
    result = measure(server, tmp_path, "--num-requests", "2", "--input-len", "3:5")
    assert result["format"] == "lightqwen-bench/1"
    assert result["command"].startswith(f"lightqwen bench --target {server.target} --warmup 0 --json ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", result["date"])
    assert result["server"]["device"] == "NVIDIA H200"
    assert result["server"]["version"] == "9.8.7"
    assert result["server"]["tensor_parallel_size"] == 2
    assert result["model"]["name"] == "scripted <b>"
    assert result["model"]["context_length"] == CONTEXT_LENGTH
    assert set(result["client"]) == {"version", "python", "grpcio", "platform", "cores", "processes", "connections"}
    assert result["options"]["input_len"] == "3:5"
    assert result["options"]["settings"] == {"text": True, "token_ids": False, "bypass_prefix_cache": True}
    assert len(result["client_cpu_shares"]) == 1
    for record in result["records"]:
        assert record["status"] == "OK"
        assert record["began_s"] < record["arrivals_s"][0] < record["arrivals_s"][1] <= record["ended_s"]
        assert record["tokens"] == [1, 2]


def test_without_details_there_are_none(server: ScriptedServer, tmp_path: Path) -> None:
    assert bench(server.target, "--num-requests", "2", "--json", tmp_path / "r.json").returncode == 0
    assert "records" not in json.loads((tmp_path / "r.json").read_text())


class Page(HTMLParser):
    """What a browser would fetch, which elements there are, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        values = dict(attrs)
        self.fetched += [value for name in ("src", "href", "xlink:href") if (value := values.get(name))]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_needs_nothing_else_and_has_everything(server: ScriptedServer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    server.refuse_every = 5
    done = bench(
        server.target, "--num-requests", "20", "--goodput", "tpot:5000", "--warmup", "0", "--html", tmp_path / "r.html"
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert all(value.startswith("#") for value in page.fetched), "only parts of itself"
    assert not {"script", "link", "img", "iframe", "b"} & set(page.elements), (
        "and nothing that the server could slip in"
    )
    assert page.elements.count("svg") == 1
    for word in (
        "TTFT (p50",
        "ITL (p50",
        "TPOT (p50",
        "E2EL (p50",
        "throughput and open requests",
        "TTFT of each request",
    ):
        assert word in page.text, word
    for word in (
        "scripted <b>",
        "NVIDIA H200",
        "9.8.7",
        "4 x RESOURCE_EXHAUSTED",
        "tpot 5000 ms",
        "lightqwen bench --target",
    ):
        assert word in page.text, word
    assert "16 completed, 4 failed" in page.text


def test_file_that_cannot_be_written_does_not_lose_the_table(server: ScriptedServer, tmp_path: Path) -> None:
    done = bench(server.target, "--num-requests", "2", "--json", tmp_path)
    assert done.returncode == 1
    assert "2 completed" in done.stdout
    assert f"cannot write {tmp_path}: Is a directory" in done.stderr


# ---- how the server is reached ---------------------------------------------------------------------------------------


def test_tls_and_token_reach_the_client_processes_too(tmp_path: Path) -> None:
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1")
    ca.cert_pem.write_to_path(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("secret-token")
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(leaf.private_key_pem.bytes(), chain)])
    with ScriptedServer(token="secret-token", credentials=credentials) as server:
        secrets = ["--tls-ca", tmp_path / "ca.crt", "--token-file", tmp_path / "token"]
        done = bench(server.target, "--num-requests", "4", "--processes", "2", *secrets, "--json", tmp_path / "r.json")
        assert done.returncode == 0, done.stderr
        assert "4 completed" in done.stdout
        assert "secret-token" not in (tmp_path / "r.json").read_text()
        line = errors(bench(server.target, "--tls-ca", tmp_path / "ca.crt"))
        assert "UNAUTHENTICATED" in line
        assert "--token-file" in line


def test_help_teaches() -> None:
    done = subprocess.run([*LIGHTQWEN, "bench", "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    for word in ("Poisson", "--burstiness inf", "Mooncake", "TPOT  (last arrival", "docs/benchmarking.md", "exit code"):
        assert word in done.stdout, word


def test_command_needs_only_the_client_and_numpy() -> None:
    code = """
import sys
import bench.load.command
heavy = {"torch", "pydantic", "msgspec", "zmq", "service", "worker", "model", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
