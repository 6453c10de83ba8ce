"""The command line as a user meets it: real processes, their output and exit codes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from service.config import ServeConfig
from service.terminal import Terminal, printable, read_ready_line, ready_line
from tests.processes import children, until
from worker.control import Progress

LIGHTQWEN = [sys.executable, "-m", "service.cli"]
QUIET_CPU = ["--device", "cpu", "--metrics-port", "0", "--log-level", "error"]


STRICT = {"PYTHONIOENCODING": "utf-8:strict"}  # as locales have it but for C's
"""Environment of a process that by itself neither reads nor writes what is not UTF-8."""


def run(*arguments: str | Path, typed: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*LIGHTQWEN, *map(str, arguments)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, timeout=30, env=env, input=typed)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_one_error_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode not in (0, None)
    errors = [line for line in done.stderr.splitlines() if not re.match(r"lightqwen: (?!error)", line)]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("lightqwen: error: ")
    for word in words:
        assert word in errors[0]
    assert done.stdout == ""


# ---- serve: what a user gets wrong -----------------------------------------------------------------------------------


def test_folder_that_is_not_there() -> None:
    assert_one_error_line(run("serve", "--model", "./nothing-here"), "nothing-here", "--model")


def test_folder_without_config(tmp_path: Path) -> None:
    assert_one_error_line(run("serve", "--model", tmp_path), str(tmp_path), "config.json")


def test_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert_one_error_line(run("serve", "--model", tmp_path), "config.json", "not JSON")


@pytest.mark.parametrize("content", [{"architectures": ["LlamaForCausalLM"]}, {}, [], {"architectures": None}])
def test_other_architecture(tmp_path: Path, content: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = "LlamaForCausalLM" if content == {"architectures": ["LlamaForCausalLM"]} else "unnamed"
    assert_one_error_line(run("serve", "--model", tmp_path), found, "Qwen3ForCausalLM")


def test_hub_out_of_reach(tmp_path: Path) -> None:
    done = run("serve", "--model", "Qwen/Qwen3-0.6B", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert_one_error_line(done, "Qwen/Qwen3-0.6B", "hub")


def test_revision_without_hub_id(demo_checkpoint: Path) -> None:
    assert_one_error_line(run("serve", "--model", demo_checkpoint, "--revision", "main"), "--revision")


def test_unknown_option() -> None:
    assert_one_error_line(run("serve", "--no-such-option", "1"), "no-such-option")


def test_value_out_of_range() -> None:
    assert_one_error_line(run("serve", "--tensor-parallel-size", "0"), "--tensor-parallel-size", "0")


def test_value_from_the_environment_is_checked_too() -> None:
    assert_one_error_line(run("serve", LIGHTQWEN_PORT="99999"), "--port", "99999")


def test_config_file_that_is_not_there(tmp_path: Path) -> None:
    assert_one_error_line(run("serve", "--config", tmp_path / "none.toml"), "none.toml")


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port, *QUIET_CPU)
    assert_one_error_line(done, port, "--port")


def test_ranks_that_the_heads_do_not_divide_by() -> None:
    done = run("serve", "--port", "0", *QUIET_CPU, "--tensor-parallel-size", "3")
    assert_one_error_line(done, "3")


def test_truncated_weights(demo_checkpoint: Path, tmp_path: Path) -> None:
    for path in demo_checkpoint.glob("*.json"):
        shutil.copy(path, tmp_path)
    weights = (demo_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = run("serve", "--model", tmp_path, "--port", "0", *QUIET_CPU)
    assert_one_error_line(done, "model.safetensors")


@pytest.mark.parametrize("option", ["--auth-tokens-file", "--admin-tokens-file"])
def test_tokens_file_that_is_not_there_or_empty(tmp_path: Path, option: str) -> None:
    assert_one_error_line(run("serve", "--port", "0", *QUIET_CPU, option, tmp_path / "none"), "none", "No such file")
    (tmp_path / "empty").touch()
    assert_one_error_line(run("serve", "--port", "0", *QUIET_CPU, option, tmp_path / "empty"), "empty is empty")


def test_certificate_that_is_not_there(tmp_path: Path) -> None:
    files = ["--tls-cert", tmp_path / "tls.crt", "--tls-key", tmp_path / "tls.key"]
    assert_one_error_line(run("serve", "--port", "0", *QUIET_CPU, *files), "tls.crt", "No such file")


def test_server_without_its_packages() -> None:
    code = """
import sys
sys.modules["pydantic"] = None
sys.argv = ["lightqwen", "serve"]
from service.cli import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert_one_error_line(done, "pydantic", "lightqwen[server]")


def test_what_starts_the_ranks_imports_little_before() -> None:
    """They are what a start waits for: what the gateways need is imported by the gateways, beside them."""
    code = """
import sys
from worker import supervisor
def serve(engine, gateways, **_):
    heavy = {"grpc", "jinja2", "numpy", "tokenizers", "torch", "zmq"} & set(sys.modules)
    assert not heavy, heavy
    return 0
supervisor.serve = serve
sys.argv = ["lightqwen", "serve"]
from service.cli import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("processes", [2, 3])  # with the gateway, with the rank; besides what tracks their resources
def test_ctrl_c_while_it_starts_ends_it_without_a_word(processes: int) -> None:
    """A terminal sends it to every process, also to those that are still importing what they need."""
    command = [*LIGHTQWEN, "serve", "--port", "0", *QUIET_CPU]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        until(lambda: len(children(process.pid)) >= processes, 20.0, "it does not start")
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert [line for line in errors.splitlines() if not line.startswith("lightqwen: rank0: ")] == []


# ---- help ------------------------------------------------------------------------------------------------------------


def test_serve_help_has_every_option_with_its_meaning() -> None:
    done = run("serve", "--help", COLUMNS="400")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for name, field in ServeConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text, name
        assert field.description, f"{name} has no docstring"
        assert " ".join(field.description.split()) in text, name


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["bench"]])
def test_help_starts_quickly_and_needs_no_server_package(command: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["lightqwen", *{command!r}, "--help"]
from service.cli import main
try:
    main()
finally:
    heavy = {{"torch", "pydantic", "msgspec", "numpy", "zmq"}} & set(sys.modules)
    assert not heavy, heavy
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "usage: lightqwen" in done.stdout
    assert time.monotonic() - began < 5


def test_version() -> None:
    done = run("--version")
    assert re.fullmatch(r"lightqwen \d+\.\d+\.\d+\n", done.stdout)


# ---- generate and chat: against a served checkpoint ------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(endless_checkpoint: Path) -> Iterator[str]:
    model = ["--model", str(endless_checkpoint)]
    logs = ["--log-level", "info", "--log-format", "json"]
    command = [*LIGHTQWEN, "serve", "--port", "0", *QUIET_CPU, *model, *logs, "--num-blocks", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        facts = read_ready_line(process.stdout.readline())
        assert facts is not None, process.stderr.read()
        assert facts["model"] == "endless"
        assert facts["kv_blocks"] == "64"
        assert facts["tensor_parallel_size"] == "1"
        yield facts["address"]
        process.terminate()
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
        records = [json.loads(line) for line in rest.splitlines() if not line.startswith("lightqwen: ")]
        assert {record["process"] for record in records} == {"rank0", "gateway"}


def test_generate_streams_text_and_stats(target: str) -> None:
    done = run("generate", "Hello", "--target", target, "--max-tokens", "8", "--temperature", "0", "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"finish reason max_tokens; \d+ prompt tokens .* 8 output tokens; first token after", done.stderr)


def test_generate_is_repeatable_and_raw_is_not_the_template(target: str) -> None:
    options = ["Hello", "--target", target, "--max-tokens", "8", "--seed", "7"]
    first, again, raw = run("generate", *options), run("generate", *options), run("generate", "--raw", *options)
    assert first.stdout == again.stdout
    assert raw.returncode == 0
    assert raw.stdout != first.stdout


def test_refusal_is_one_line(target: str) -> None:
    assert_one_error_line(run("generate", "x", "--target", target, "--top-p", "7"), "INVALID_ARGUMENT", "top_p")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["x", "--max-tokens", "99999999999"], ["max_tokens", "99999999999"]),
        (["x", "--seed", "-1"], ["seed", "-1"]),
        ([b"\xff\xfe"], ["UTF-8"]),
        ([b"\xff\xfe", "--raw"], ["UTF-8"]),
        (["x", "--system", b"\xff"], ["UTF-8"]),
    ],
)
def test_what_the_contract_has_no_room_for_is_one_line(options: list[str | bytes], words: list[str]) -> None:
    assert_one_error_line(run("generate", *map(os.fsdecode, options), "--target", "127.0.0.1:1"), *words)


@pytest.mark.parametrize("environment", [{}, STRICT])
def test_a_prompt_that_cannot_be_read_is_one_line(environment: dict[str, str]) -> None:
    done = run("generate", "-", "--target", "127.0.0.1:1", typed=b"Gr\xfc\xdfe", **environment)
    assert_one_error_line(done, "what you typed is not UTF-8")


def test_a_prompt_from_nowhere_is_one_line() -> None:
    command = shlex.join([*LIGHTQWEN, "generate", "-", "--target", "127.0.0.1:1"])
    done = subprocess.run(["sh", "-c", f"{command} <&-"], capture_output=True, text=True, timeout=30)
    assert_one_error_line(done, "standard input is closed")


def test_text_that_the_terminal_does_not_know_is_escaped(target: str) -> None:
    options = ["Hello", "--target", target, "--max-tokens", "200", "--seed", "7"]
    expected = run("generate", *options).stdout
    assert not expected.isascii(), "the test shows nothing"
    done = run("generate", *options, PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected.encode("ascii", "backslashreplace").decode()


def test_nobody_there_is_one_line() -> None:
    remedy = "is a server running there? `lightqwen serve` starts one"
    for command in (["generate", "x"], ["chat"]):
        assert_one_error_line(run(*command, "--target", "127.0.0.1:1"), "127.0.0.1:1: UNAVAILABLE", remedy)


def test_raw_with_a_system_message_is_refused() -> None:
    assert_one_error_line(run("generate", "x", "--raw", "--system", "s"), "--raw")


def test_reader_that_leaves_early_ends_generate_quietly(target: str) -> None:
    command = [*LIGHTQWEN, "generate", "Hello", "--target", target, "--max-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == b""


# ---- generate and chat: against a server that wants TLS and a token --------------------------------------------------


@dataclass
class Secured:
    target: str
    ca: Path
    client: tuple[Path, Path]  # certificate and key
    token: Path


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secrets")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.crt")
    for name in ("server", "client"):
        leaf = ca.issue_cert(f"{name}.example")
        leaf.private_key_pem.write_to_path(folder / f"{name}.key")
        leaf.cert_chain_pems[0].write_to_path(folder / f"{name}.crt")
    (folder / "tokens").write_text("me:secret-token\n")
    (folder / "token").write_text("secret-token\n")
    options = ["--tls-cert", folder / "server.crt", "--tls-key", folder / "server.key"]
    options += ["--tls-client-ca", folder / "ca.crt", "--auth-tokens-file", folder / "tokens"]
    command = [*LIGHTQWEN, "serve", "--port", "0", *QUIET_CPU, "--num-blocks", "64", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        facts = read_ready_line(process.stdout.readline())
        assert facts is not None
        assert facts["tls"] == "mutual"
        client = (folder / "client.crt", folder / "client.key")
        yield Secured(facts["address"], folder / "ca.crt", client, folder / "token")
        process.terminate()
        assert process.wait(30) == 0


def ask(secured: Secured, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("generate", "Hi", "--max-tokens", "4", "--target", secured.target, *options, **environment)


def test_generate_over_mutual_tls_with_a_token(secured: Secured) -> None:
    cert, key = secured.client
    tls = ["--tls-ca", secured.ca, "--tls-cert", cert, "--tls-key", key, "--tls-server-name", "server.example"]
    for options, environment in (
        (["--token-file", secured.token], {}),
        ([], {"LIGHTQWEN_TOKEN": "secret-token"}),
        (["--token-file", secured.token], {"LIGHTQWEN_TOKEN": "wrong"}),
    ):
        done = ask(secured, *tls, *options, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    assert_one_error_line(ask(secured, *tls), "UNAUTHENTICATED", "bearer token")
    assert_one_error_line(ask(secured, *tls, LIGHTQWEN_TOKEN="wrong"), "UNAUTHENTICATED")
    without_cert = ["--tls-ca", secured.ca, "--tls-server-name", "server.example"]
    assert_one_error_line(ask(secured, *without_cert, "--token-file", secured.token), "UNAVAILABLE")
    assert_one_error_line(ask(secured, "--tls", "--token-file", secured.token), "UNAVAILABLE")
    assert_one_error_line(ask(secured, "--token-file", secured.token), "UNAVAILABLE")


def test_secrets_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "two").write_text("one\ntwo\n")
    assert_one_error_line(run("generate", "x", "--token-file", tmp_path / "none"), "none", "No such file")
    assert_one_error_line(run("generate", "x", "--token-file", tmp_path / "empty"), "empty is empty")
    assert_one_error_line(run("generate", "x", "--token-file", tmp_path / "two"), "two is not one token")
    assert_one_error_line(run("generate", "x", "--tls-ca", tmp_path / "none"), "none", "No such file")
    assert_one_error_line(run("generate", "x", "--tls-cert", tmp_path / "two"), "--tls-cert and --tls-key")


class Screen:
    """A program on a pseudo-terminal, and what it has written that was not expected yet."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, {**os.environ, **environment})
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, os.fsencode(text))

    def expect(self, text: str, then: int = 0, timeout: float = 20.0) -> str:
        """Read until `text` has come, and so many characters after it; returns what came before it."""
        deadline = time.monotonic() + timeout
        while text not in self._unread or len(self._unread.split(text, 1)[1]) < then:
            readable, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"no {text!r} within {timeout} s, but {self._unread!r}"
            self._unread += os.read(self._terminal, 4096).decode(errors="replace")
        before, after = self._unread.split(text, 1)
        self._unread = after[then:]
        return before

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("environment", [{}, STRICT])
def test_chat_ctrl_c_stops_one_answer_only(target: str, environment: dict[str, str]) -> None:
    # In C's own locale the line editor would leave out bytes that are not ASCII.
    command = [*LIGHTQWEN, "chat", "--target", target, "--seed", "1", "--max-tokens", "2000"]
    screen = Screen(command, LC_ALL="C.UTF-8", **environment)
    screen.expect("endless: /reset")
    screen.expect("> ")
    screen.type("Hello there\n")
    screen.expect("Hello there\r\n", then=8)
    screen.type("\x03")  # Ctrl-C
    screen.expect("> ")
    screen.type("/unknown\n")
    screen.expect("/quit (or Ctrl-D) ends")
    screen.expect("> ")
    screen.type("\udcff\n")  # a byte that is not UTF-8
    screen.expect("error: what you typed is not UTF-8")
    screen.expect("> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.wait() == 0


def test_chat_sends_what_was_said_before_until_reset(target: str) -> None:
    screen = Screen([*LIGHTQWEN, "chat", "--target", target, "--seed", "1", "--max-tokens", "4", "--stats"])
    prompt_tokens = []
    for line in ("One", "Two", "/reset", "One"):
        screen.expect("> ")
        screen.type(f"{line}\n")
        if not line.startswith("/"):
            screen.expect("finish reason max_tokens; ")
            prompt_tokens.append(int(screen.expect(" prompt tokens")))
    screen.expect("> ")
    screen.type("/quit\n")
    assert screen.wait() == 0
    first, second, after_reset = prompt_tokens
    assert second > first + 4
    assert after_reset == first


def test_ctrl_c_ends_a_starting_server_without_a_traceback() -> None:
    command = [*LIGHTQWEN, "serve", "--port", "0", *QUIET_CPU]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""


# ---- what the terminal shows -----------------------------------------------------------------------------------------


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ready_line_round_trip() -> None:
    facts = {"address": "[::1]:5", "model": "my model's", "kv_blocks": 12}
    line = ready_line(facts, 1.234)
    assert "\n" not in line
    assert read_ready_line(line) == {"address": "[::1]:5", "model": "my model's", "kv_blocks": "12", "ready_s": "1.23"}
    assert read_ready_line("lightqwen: loading") is None


def test_progress_updates_one_line_on_a_terminal() -> None:
    stream = Tty()
    terminal = Terminal(stream)
    for done in range(3):
        terminal.progress("rank0", Progress("loading weights", done, 3))
    terminal.close()
    assert "\n" not in stream.getvalue()
    assert "rank0: loading weights 2/3" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K"), "the screen is clean for what comes next"


def test_progress_is_sparse_elsewhere() -> None:
    stream, now = io.StringIO(), [0.0]
    terminal = Terminal(stream, clock=lambda: now[0])
    for done in range(100):
        now[0] += 0.1
        terminal.progress("rank0", Progress("loading weights", done, 100))
    terminal.progress("rank0", Progress("capturing graphs"))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "lightqwen: rank0: loading weights 0/100"
    assert lines[-1] == "lightqwen: rank0: capturing graphs"
    assert len(lines) == 3, "at the beginning, after 5 s, and the next thing"


def test_text_of_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tc\u202e你🌍") == "a\ufffd[2Jb\n\tc\ufffd你🌍"


def test_documentation_has_every_option_with_its_default(root: Path) -> None:
    text = (root / "docs" / "configuration.md").read_text()
    for name, field in ServeConfig.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            shown = "on" if default else "off"
        else:
            shown = "" if default in (None, "") else f"`{default}`"
        meaning = " ".join((field.description or "").split())
        option = name.replace("_", "-")
        row = f"| `--{option}` | {shown} | {meaning} |"
        assert row in text, f"docs/configuration.md lacks: {row}"
