"""A release from its installation to its end: a real helm against the API server in fake_api.py."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helm.chart import CHART, NAMESPACE, RELEASE, SCENARIOS, Object, flags, helm, parse, render
from tests.helm.fake_api import KINDS, FakeApi, fake_api, merged, strategic

PLURALS = {kind: plural for kinds in KINDS.values() for plural, kind in kinds.items()}
LARGEST_SECRET = 1_048_576

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as api:
        yield api


@pytest.fixture
def run(api: FakeApi, tmp_path: Path) -> Run:
    """helm, talking to that server."""

    def run(command: str, *arguments: Any, values: dict[str, Any] | None = None, check: bool = True) -> Any:
        where = ["--kube-apiserver", api.url, "--namespace", NAMESPACE]
        return helm(command, *where, *arguments, *flags(values), home=tmp_path, check=check)

    return run


def install(run: Run, name: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("install", RELEASE, CHART, "--create-namespace", "--values", SCENARIOS[name], **options)


def upgrade(run: Run, name: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("upgrade", RELEASE, CHART, "--values", SCENARIOS[name], **options)


def as_rendered(item: Object) -> Object:
    """Without what a server and helm add to an object."""
    metadata = {key: value for key, value in item["metadata"].items() if key in ("name", "labels", "annotations")}
    notes = {
        key: value for key, value in metadata.get("annotations", {}).items() if not key.startswith("meta.helm.sh/")
    }
    metadata.pop("annotations", None)
    return {key: value for key, value in item.items() if key not in ("metadata", "status")} | {
        "metadata": metadata | ({"annotations": notes} if notes else {})
    }


def assert_cluster_is(api: FakeApi, name: str, **options: Any) -> None:
    """The cluster has what the chart renders with these values, to the last field, and nothing else of the release."""
    known = [f"{api}/{kind}" for api, kinds in KINDS.items() for kind in kinds.values()]
    wanted = {
        (PLURALS[item["kind"]], item["metadata"]["name"]): item
        for item in render(SCENARIOS[name], apis=known, **options)
        if "helm.sh/hook" not in item["metadata"].get("annotations", {})
    }
    found = {
        (plural, object_name): as_rendered(item)
        for (plural, namespace, object_name), item in api.objects.items()
        if namespace == NAMESPACE and plural not in ("pods", "secrets")
    }
    assert found == wanted


def test_whole_life(api: FakeApi, run: Run) -> None:
    notes = install(run, "one-gpu").stdout
    assert "STATUS: deployed" in notes
    assert_cluster_is(api, "one-gpu")

    tested = run("test", RELEASE).stdout
    assert "Phase:          Succeeded" in tested
    (pod,) = api.named("pods").values()
    assert pod["spec"]["containers"][0]["command"][:2] == ["lightqwen", "generate"]

    changed = {"engine.tensorParallelSize": 2, "lifecycle.drainSeconds": 300, "extraEnv": [{"name": "A", "value": "b"}]}
    upgrade(run, "one-gpu", values=changed)
    assert_cluster_is(api, "one-gpu", values=changed)
    deployment = api.named("deployments")[f"{RELEASE}-lightqwen"]["spec"]["template"]["spec"]
    assert deployment["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert deployment["terminationGracePeriodSeconds"] == 335
    run("test", RELEASE)  # the pod of the last test is in nobody's way

    run("rollback", RELEASE, "1")
    assert_cluster_is(api, "one-gpu")
    assert "3" in run("history", RELEASE).stdout

    run("uninstall", RELEASE)
    assert [key for key in api.objects if key[0] not in ("namespaces", "pods")] == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_example_installs_and_goes(name: str, api: FakeApi, run: Run) -> None:
    assert_notes_are_good(name, install(run, name).stdout.partition("NOTES:")[2])
    assert_cluster_is(api, name)
    stored = [item for key, item in api.objects.items() if key[0] == "secrets"]
    assert len(stored) == 1
    assert len(base64.b64decode(stored[0]["data"]["release"])) < LARGEST_SECRET
    run("uninstall", RELEASE)
    left = {key[0] for key in api.objects} - {"namespaces"}
    assert left == ({"persistentvolumeclaims"} if name == "tensor-parallel" else set())


def assert_notes_are_good(name: str, notes: str) -> None:
    """They tell how to reach the server, ready to copy, and warn of what is open."""
    assert f"dns:///{RELEASE}-lightqwen-headless.{NAMESPACE}:50051" in notes
    assert '{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}' in notes
    assert f"helm -n {NAMESPACE} test {RELEASE}" in notes
    assert ("WARNING: no bearer tokens" in notes) is (name != "tls")
    assert "WARNING: nothing scrapes" not in notes
    alone = {"one-gpu", "tensor-parallel", "tls", "cpu-demo"}
    assert ("With one replica, an upgrade is a pause" in notes) is (name in alone)
    assert ("8 GPU(s) in each pod, 2 pods in each group" in notes) is (name == "multi-node")
    assert "downloads the model again" not in notes
    assert "<no value>" not in notes
    assert "%!" not in notes


@pytest.mark.parametrize(
    ("before", "after"), [("one-gpu", "multi-node"), ("tls", "autoscaled"), ("autoscaled", "cpu-demo")]
)
def test_one_kind_of_installation_becomes_another(before: str, after: str, api: FakeApi, run: Run) -> None:
    install(run, before)
    upgrade(run, after)
    assert_cluster_is(api, after)
    run("rollback", RELEASE, "1")
    assert_cluster_is(api, before)


def test_a_release_comes_back_to_its_download(api: FakeApi, run: Run) -> None:
    install(run, "tensor-parallel")
    claim = api.named("persistentvolumeclaims")[f"{RELEASE}-lightqwen-models"]["metadata"]["uid"]
    run("uninstall", RELEASE)
    install(run, "tensor-parallel")
    assert api.named("persistentvolumeclaims")[f"{RELEASE}-lightqwen-models"]["metadata"]["uid"] == claim


def test_an_upgrade_leaves_the_replicas_to_the_scaler(api: FakeApi, run: Run) -> None:
    install(run, "autoscaled")
    deployment = api.named("deployments")[f"{RELEASE}-lightqwen"]
    deployment["spec"]["replicas"] = 5
    upgrade(run, "autoscaled", values={"config.max_running": 17})
    assert "max_running = 17" in api.named("configmaps")[f"{RELEASE}-lightqwen"]["data"]["server.toml"]
    assert api.named("deployments")[f"{RELEASE}-lightqwen"]["spec"]["replicas"] == 5


def test_a_test_that_fails_fails(api: FakeApi, run: Run) -> None:
    api.judge = lambda pod: "Failed"
    install(run, "cpu-demo")
    done = run("test", RELEASE, check=False)
    assert done.returncode != 0
    assert "pod qwen-lightqwen-test-generate failed" in done.stderr


def test_a_gateway_before_a_server_with_tls_is_told_what_it_needs(run: Run) -> None:
    route = {"grpcRoute.enabled": True, "grpcRoute.parentRefs": [{"name": "inference"}]}
    assert "needs a BackendTLSPolicy for the Service qwen-lightqwen" in install(run, "tls", values=route).stdout
    assert "BackendTLSPolicy" not in upgrade(run, "one-gpu", values=route).stdout


def test_a_refused_upgrade_changes_nothing(api: FakeApi, run: Run) -> None:
    install(run, "one-gpu")
    writes = [request for request in api.requests if request[0] != "GET"]
    done = upgrade(run, "one-gpu", values={"engine.tensorParallelSize": 3, "engine.nodes": 2}, check=False)
    assert done.returncode != 0
    assert "does not divide" in done.stderr
    assert [request for request in api.requests if request[0] != "GET"] == writes
    assert_cluster_is(api, "one-gpu")


def test_a_server_that_does_not_know_a_kind_says_so(api: FakeApi, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KINDS, "leaderworkerset.x-k8s.io/v1")
    done = install(run, "multi-node", check=False)
    assert done.returncode != 0
    assert 'no matches for kind "LeaderWorkerSet"' in done.stderr
    assert not api.named("deployments")


# -- the server's own merging, which the tests above lean on ----------------------------------------------------------


def test_merge_patch() -> None:
    before = {"a": {"b": 1, "c": 2}, "list": [1, 2]}
    assert merged(before, {"a": {"b": None, "d": 3}, "list": [3]}) == {"a": {"c": 2, "d": 3}, "list": [3]}


def test_strategic_merge_patch() -> None:
    before = {
        "containers": [{"name": "x", "image": "1", "env": [{"name": "A", "value": "a"}, {"name": "B", "value": "b"}]}]
    }
    env: list[Any] = [{"name": "A", "$patch": "delete"}, {"name": "C", "value": "c"}]
    order = [{"name": "C"}, {"name": "B"}]
    patch = {"containers": [{"name": "x", "image": "2", "env": env, "$setElementOrder/env": order}]}
    assert strategic(before, patch) == {
        "containers": [{"name": "x", "image": "2", "env": [{"name": "C", "value": "c"}, {"name": "B", "value": "b"}]}]
    }
    volumes = {"volumes": [{"name": "m", "emptyDir": {}}]}
    swap = {"volumes": [{"name": "m", "$retainKeys": ["name", "image"], "image": {"reference": "r"}}]}
    assert strategic(volumes, swap) == {"volumes": [{"name": "m", "image": {"reference": "r"}}]}


def test_manifests_are_parsed_strictly() -> None:
    with pytest.raises(AssertionError, match="keys given twice"):
        parse("a: 1\na: 2\n")
