"""The HTTP side: /metrics for Prometheus and /healthz for whoever decides whether this process should be restarted.

It runs on a thread of its own, so that /healthz can tell that the event loop has stopped.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

Check = Callable[[], str | None]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """As the base, but without its look-up of the host's name, which may take seconds."""
        # A server that starts again gets its port back, although connections of the last one linger there.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds; a client that says nothing does not keep a thread

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: scrapes are not news."""


class HttpEndpoint:
    """Serves until `close`.

    Args:
        check: tells what is wrong with the process, or None.

    Raises:
        OSError: the address is taken or not ours.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, check: Check) -> None:
        self._metrics = make_wsgi_app(registry)
        self._check = check
        server_class = _ServerV6 if ":" in host else _Server
        self._server = make_server(host.strip("[]"), port, self._answer, server_class, _Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        if path == "/healthz":
            problem = self._check()
            status, text = ("200 OK", "ok") if problem is None else ("503 Service Unavailable", problem)
        else:
            status, text = "404 Not Found", "/metrics and /healthz are here"
        body = f"{text}\n".encode()
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
        return [body]
