"""The init container's command, run for real against a small hub of our own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.model_folder import check_checkpoint
from tests.helm.chart import SCENARIOS, render
from tests.helm.test_live import environment, here, moved

REPOSITORY, REVISION, TOKEN = "Qwen/Qwen3-32B", "9216db5781bf21249d130ec9da846c4624c16137", "hf_of_the_secret"


class Hub:
    """One commit of one repository, for whoever has the token."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.sent: list[str] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b"{}")
        elif path in (f"/api/models/{REPOSITORY}/revision/{REVISION}", f"/api/models/{REPOSITORY}/tree/{REVISION}"):
            entries = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in self.hub.files.items()]
            siblings = [{"rfilename": name} for name in self.hub.files]
            info = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": REVISION, "siblings": siblings}
            self._answer(200, json.dumps(entries if "/tree/" in path else info).encode())
        elif path.startswith(start := f"/{REPOSITORY}/resolve/{REVISION}/") and path[len(start) :] in self.hub.files:
            name = path[len(start) :]
            if self.command == "GET":
                self.hub.sent.append(name)
            body = self.hub.files[name]
            self._answer(200, body, {"ETag": f'"{etag(body)}"', "X-Repo-Commit": REVISION})
        else:
            self._answer(404, b"{}")

    do_GET = do_HEAD

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def etag(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


@contextmanager
def hub_with(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(demo_checkpoint: Path) -> Iterator[Hub]:
    files = {
        path.name: path.read_bytes() for path in demo_checkpoint.iterdir() if path.suffix in (".json", ".safetensors")
    }
    with hub_with(files | {"training_args.bin": b"not wanted", "pytorch_model.pt": b"a pickle"}) as hub:
        yield hub


def fetch(hub: Hub, places: dict[str, Path], token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """What the kubelet would run, with the token in the file of its Secret."""
    (places["/etc/lightqwen/hub-token"] / "token").write_text(f"{token}\n")
    (spec,) = render(SCENARIOS["tensor-parallel"]).template["spec"]["initContainers"]
    told = environment(spec, places) | {"HF_ENDPOINT": hub.url}
    command = here(spec["command"], places)
    return subprocess.run(command, env=told, capture_output=True, text=True, timeout=50, check=False)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    names = {"/models": "models", "/cache": "cache", "/tmp": "tmp", "/etc/lightqwen/hub-token": "token"}
    found = {mount: tmp_path / name for mount, name in names.items()}
    for folder in found.values():
        folder.mkdir()
    return found


def test_fetches_the_commit_to_where_the_server_looks(hub: Hub, places: dict[str, Path]) -> None:
    import tomllib

    done = fetch(hub, places)
    assert done.returncode == 0, done.stderr
    told = tomllib.loads(render(SCENARIOS["tensor-parallel"]).config_text)["model"]
    folder = Path(moved(told, places))
    check_checkpoint(folder)
    wanted = {name: body for name, body in hub.files.items() if name.endswith((".json", ".safetensors"))}
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == wanted

    sent = len(hub.sent)
    assert fetch(hub, places).returncode == 0
    assert len(hub.sent) == sent, "what is there is not fetched again"


def test_a_refused_token_is_an_error(hub: Hub, places: dict[str, Path]) -> None:
    done = fetch(hub, places, token="hf_wrong")
    assert done.returncode != 0
    assert done.stderr
    assert not list(places["/models"].rglob("*.safetensors"))
