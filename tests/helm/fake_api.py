"""A small Kubernetes API server: enough of one that a real helm installs, tests, upgrades, rolls back and uninstalls.

It stores what it is given, after strict validation. Patches are merged as the real one merges them (JSON merge patches
for custom resources, strategic ones for its own kinds). No controller runs: pods are judged by a function of the test.
"""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.helm.chart import Object
from tests.helm.schemas import problems

VERSION = "1.33.0"

# api -> plural -> kind
KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "namespaces": "Namespace",
        "configmaps": "ConfigMap",
        "secrets": "Secret",
        "services": "Service",
        "serviceaccounts": "ServiceAccount",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "pods": "Pod",
    },
    "apps/v1": {"deployments": "Deployment"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "leaderworkerset.x-k8s.io/v1": {"leaderworkersets": "LeaderWorkerSet"},
    "keda.sh/v1alpha1": {"scaledobjects": "ScaledObject"},
    "monitoring.coreos.com/v1": {
        "podmonitors": "PodMonitor",
        "servicemonitors": "ServiceMonitor",
        "prometheusrules": "PrometheusRule",
    },
    "gateway.networking.k8s.io/v1": {"grpcroutes": "GRPCRoute"},
    "inference.networking.k8s.io/v1": {"inferencepools": "InferencePool"},
}

# By what the elements of a list are told apart when a strategic patch is merged; lists that are not here are replaced.
MERGE_KEYS = {
    ("containers",): "name",
    ("initContainers",): "name",
    ("volumes",): "name",
    ("env",): "name",
    ("volumeMounts",): "mountPath",
    ("imagePullSecrets",): "name",
    ("topologySpreadConstraints",): "topologyKey",
    ("containers", "ports"): "containerPort",
    ("spec", "ports"): "port",
}

OURS = ("uid", "resourceVersion", "creationTimestamp")  # of the metadata: set here, not by clients

Judge = Callable[[Object], str]
Key = tuple[str, str, str]  # plural, namespace, name


class ApiError(Exception):
    """What the client is told."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }


class FakeApi:
    """The objects of a cluster, and what was asked about them.

    Args:
        judge: the phase that a pod ends in; called when it is created.
    """

    def __init__(self, judge: Judge = lambda pod: "Succeeded") -> None:
        self.objects: dict[Key, Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.judge = judge
        self.url = ""
        self._lock = threading.Lock()
        self._versions = itertools.count(1)

    def named(self, plural: str, namespace: str | None = None) -> dict[str, Object]:
        """Objects of one kind by name."""
        return {
            name: item
            for (kind, where, name), item in self.objects.items()
            if kind == plural and namespace in (None, where)
        }

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def create(self, plural: str, namespace: str, item: Object) -> Object:
        key = (plural, namespace, item["metadata"]["name"])
        with self._lock:
            if key in self.objects:
                raise ApiError(409, "AlreadyExists", f"{plural} {key[2]!r} already exists")
            if plural == "pods":
                item["status"] = {"phase": self.judge(item)}
            return self._store(key, item)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        if (plural, namespace, name) not in self.objects:
            raise ApiError(404, "NotFound", f"{plural} {name!r} not found")
        return self.objects[plural, namespace, name]

    def put(self, plural: str, namespace: str, name: str, item: Object) -> Object:
        self.get(plural, namespace, name)
        with self._lock:
            return self._store((plural, namespace, name), item)

    def patch(self, plural: str, namespace: str, name: str, patch: Object, content_type: str) -> Object:
        before = self.get(plural, namespace, name)
        if content_type == "application/strategic-merge-patch+json":
            after = strategic(before, patch)
        elif content_type == "application/merge-patch+json":
            after = merged(before, patch)
        else:
            raise ApiError(415, "UnsupportedMediaType", f"the patch is of type {content_type}")
        with self._lock:
            return self._store((plural, namespace, name), after)

    def delete(self, plural: str, namespace: str, name: str) -> Object:
        self.get(plural, namespace, name)
        with self._lock:
            return self.objects.pop((plural, namespace, name))

    def list(self, plural: str, namespace: str, labels: str, fields: str) -> list[Object]:
        wanted = dict(pair.split("=", 1) for pair in labels.split(",") if pair)
        name = dict(pair.split("=", 1) for pair in fields.split(",") if pair).get("metadata.name")
        return [
            item
            for found, item in sorted(self.named(plural, namespace).items())
            if wanted.items() <= item["metadata"].get("labels", {}).items() and name in (None, found)
        ]

    def _store(self, key: Key, item: Object) -> Object:
        before = self.objects.get(key)
        given = {name: value for name, value in item["metadata"].items() if name not in OURS}
        found = problems({k: v for k, v in item.items() if k != "status"} | {"metadata": given}, VERSION)
        if found:
            raise ApiError(422, "Invalid", "; ".join(found))
        if before is not None and key[0] == "deployments" and before["spec"]["selector"] != item["spec"]["selector"]:
            raise ApiError(422, "Invalid", "spec.selector: field is immutable")
        item = copy.deepcopy(item)
        item["metadata"]["resourceVersion"] = str(next(self._versions))
        item["metadata"].setdefault("uid", f"uid-{item['metadata']['resourceVersion']}")
        item["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        if key[1]:
            item["metadata"]["namespace"] = key[1]
        self.objects[key] = item
        return item


# -- patches -----------------------------------------------------------------------------------------------------------


def merged(before: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386), applied."""
    if not isinstance(patch, dict):
        return patch
    after = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = merged(after.get(key), value)
    return after


def strategic(before: Any, patch: Any, path: tuple[str, ...] = ()) -> Any:
    """A strategic merge patch, applied: as above, but lists with a merge key are merged element by element."""
    if not isinstance(patch, dict) or not isinstance(before, dict):
        return _plain(patch)
    if patch.get("$patch") == "replace":
        return _plain(patch)
    after = dict(before)
    if "$retainKeys" in patch:
        after = {key: value for key, value in after.items() if key in patch["$retainKeys"]}
    for key, value in patch.items():
        here = (*path, key)
        if key.startswith("$"):
            continue
        if value is None:
            after.pop(key, None)
        elif isinstance(value, list) and _merge_key(here) is not None:
            after[key] = _merge_list(after.get(key, []), value, patch.get(f"$setElementOrder/{key}"), here)
        else:
            after[key] = strategic(after.get(key), value, here)
    return after


def _merge_key(path: tuple[str, ...]) -> str | None:
    """Indices are not part of the path, so its end says which list it is."""
    return next((key for end, key in MERGE_KEYS.items() if path[-len(end) :] == end), None)


def _merge_list(before: list[Any], patch: list[Any], order: list[Any] | None, path: tuple[str, ...]) -> list[Any]:
    name = _merge_key(path)
    assert name is not None
    after = {item[name]: item for item in before}
    for item in patch:
        if item.get("$patch") == "delete":
            after.pop(item[name], None)
        else:
            after[item[name]] = strategic(after.get(item[name]), item, path)
    wanted = [item[name] for item in order or []]
    return sorted(after.values(), key=lambda item: wanted.index(item[name]) if item[name] in wanted else len(wanted))


def _plain(value: Any) -> Any:
    """Without the patch's own directives."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not key.startswith("$") and item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# -- HTTP --------------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    api: FakeApi
    over: threading.Event

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing; `FakeApi.requests` has it all."""

    def _answer(self, code: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.api.requests.append((self.command, url.path))
        try:
            if url.path == "/openapi/v2":
                self._answer(200, b"", "application/octet-stream")  # an empty protobuf: no schemas; ours are stricter
            elif query.get("watch") in ("true", "1"):
                self._watch()
            else:
                answer = discovery(url.path) or self._object(url.path, query, json.loads(body) if body else {})
                self._answer(201 if self.command == "POST" else 200, json.dumps(answer).encode())
        except ApiError as error:
            self._answer(error.code, json.dumps(error.status).encode())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _watch(self) -> None:
        """Nothing ever changes by itself: pods have their phase from the start."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.over.wait(10)
        self.close_connection = True

    def _object(self, path: str, query: dict[str, str], body: Object) -> Object:
        api, namespace, plural, name = _parse(path)
        kind = KINDS[api][plural]
        if self.command == "POST":
            return self.api.create(plural, namespace, body)
        if not name:
            found = self.api.list(plural, namespace, query.get("labelSelector", ""), query.get("fieldSelector", ""))
            return {"kind": f"{kind}List", "apiVersion": api, "metadata": {"resourceVersion": "1"}, "items": found}
        if self.command == "GET":
            return self.api.get(plural, namespace, name)
        if self.command == "PUT":
            return self.api.put(plural, namespace, name, body)
        if self.command == "DELETE":
            return self.api.delete(plural, namespace, name)
        return self.api.patch(plural, namespace, name, body, self.headers["Content-Type"])


def _parse(path: str) -> tuple[str, str, str, str]:
    """api, namespace, plural and name of a path such as /apis/apps/v1/namespaces/x/deployments/y."""
    parts = path.strip("/").split("/")
    api, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    plural, name = (*rest, "")[:2] if rest else ("", "")
    if plural not in KINDS.get(api, {}) or len(rest) > 2:
        raise ApiError(404, "NotFound", f"the server could not find {path}")
    return api, namespace, plural, name


def discovery(path: str) -> Object | None:
    """What the server knows, or None when the path is not about that."""
    groups = {api.partition("/")[0]: api for api in KINDS if "/" in api}
    if path == "/version":
        major, minor, _ = VERSION.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{VERSION}"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = {
            group: {"groupVersion": api, "version": api.partition("/")[2]} for group, api in sorted(groups.items())
        }
        listed = [{"name": group, "versions": [item], "preferredVersion": item} for group, item in versions.items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    api = path.removeprefix("/apis/").removeprefix("/api/")
    if api not in KINDS:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "kind": kind, "namespaced": kind != "Namespace", "verbs": verbs, "singularName": kind.lower()}
        for plural, kind in KINDS[api].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}


@contextmanager
def fake_api(judge: Judge = lambda pod: "Succeeded") -> Iterator[FakeApi]:
    """Serve on a free port of this machine."""
    api, over = FakeApi(judge), threading.Event()
    handler = type("Handler", (_Handler,), {"api": api, "over": over})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield api
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
