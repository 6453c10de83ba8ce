"""What no schema sees: that objects fit together, that the server is told what the pod is, that pods may run at all."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import (
    CHART,
    NAMESPACE,
    NEWEST,
    RELEASE,
    SCENARIOS,
    Object,
    Rendered,
    leaves,
    oldest_for,
    render,
    scenario,
)
from tests.observability.conftest import find_tool

every = pytest.mark.parametrize("name", SCENARIOS)

# What the controller of LeaderWorkerSets adds to the pods of a group.
LEADER = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
WORKER = {"leaderworkerset.sigs.k8s.io/worker-index": "1"}


def labels_of_pods(rendered: Rendered) -> list[dict[str, str]]:
    """The labels of the server's pods; those that serve come first."""
    found = [template["metadata"]["labels"] for template in rendered.templates]
    return [found[0]] if len(found) == 1 else [found[0] | LEADER, found[1] | WORKER]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    assert selector, "a selector that names nothing selects everything, or nothing"
    return selector.items() <= labels.items()


def traffic_selectors(rendered: Rendered) -> Iterator[tuple[str, dict[str, str]]]:
    """Selectors that must find the pods which take requests, and no other."""
    for service in rendered.of("Service"):
        yield f"Service {service['metadata']['name']}", service["spec"]["selector"]
    for kind in ("PodMonitor", "InferencePool"):
        for item in rendered.of(kind):
            yield kind, item["spec"]["selector"]["matchLabels"]
    for constraint in rendered.template["spec"].get("topologySpreadConstraints", []):
        yield "topologySpreadConstraints", constraint["labelSelector"]["matchLabels"]


def all_pod_selectors(rendered: Rendered) -> Iterator[tuple[str, dict[str, str]]]:
    """Selectors that must find every pod of the server."""
    if rendered.workload["kind"] == "Deployment":
        yield "Deployment", rendered.workload["spec"]["selector"]["matchLabels"]
    yield "PodDisruptionBudget", rendered.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    yield "NetworkPolicy", rendered.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]


@every
def test_selectors_find_their_pods(name: str) -> None:
    rendered = scenario(name)
    serving, *others = labels_of_pods(rendered)
    of_test = rendered.one("Pod")["metadata"]["labels"]
    for what, selector in traffic_selectors(rendered):
        assert selects(selector, serving), what
        assert not any(selects(selector, labels) for labels in [*others, of_test]), what
    for what, selector in all_pod_selectors(rendered):
        assert all(selects(selector, labels) for labels in (serving, *others)), what
        assert not selects(selector, of_test), what


def test_pods_of_another_release_are_not_selected() -> None:
    other = labels_of_pods(render(SCENARIOS["one-gpu"], release="another"))[0]
    for what, selector in [*traffic_selectors(scenario("one-gpu")), *all_pod_selectors(scenario("one-gpu"))]:
        assert not selects(selector, other), what


@every
def test_gpus_are_the_ranks_of_the_pod(name: str) -> None:
    rendered = scenario(name)
    config = tomllib.loads(rendered.config_text)
    resource = values(name).get("gpu", {}).get("resourceName", "nvidia.com/gpu")
    for template in rendered.templates:
        (container,) = template["spec"]["containers"]
        ranks = config["tensor_parallel_size"] // config.get("nodes", 1)
        gpus = ranks if config["device"] == "cuda" else None
        assert container["resources"]["limits"].get(resource) == gpus
        assert container["resources"]["requests"].get(resource) == gpus
        assert "cpu" not in container["resources"]["limits"]
        for init in template["spec"].get("initContainers", []):
            assert resource not in init["resources"].get("limits", {}), "a download needs no GPU"


def test_a_group_has_as_many_pods_as_nodes() -> None:
    rendered = scenario("multi-node")
    spec = rendered.one("LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    config = tomllib.loads(rendered.config_text)
    assert spec["size"] == config["nodes"] == 2
    assert config["tensor_parallel_size"] == 16
    assert config["leader_port"] == 29500
    assert spec["leaderTemplate"] == spec["workerTemplate"]
    assert spec["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_a_group_s_own_service_is_not_in_the_way() -> None:
    """The controller makes a headless Service named as the LeaderWorkerSet; one of ours by that name would stop it."""
    rendered = scenario("multi-node")
    assert rendered.workload["metadata"]["name"] not in {item["metadata"]["name"] for item in rendered.of("Service")}


@every
def test_the_end_of_a_pod_leaves_time_for_each_part(name: str) -> None:
    rendered = scenario(name)
    config = tomllib.loads(rendered.config_text)
    for template in rendered.templates:
        (container,) = template["spec"]["containers"]
        pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        parts = pre_stop + config["withdrawal_s"] + config["drain_timeout_s"]
        assert template["spec"]["terminationGracePeriodSeconds"] >= parts + 10


def test_no_wait_before_the_end_is_no_hook() -> None:
    rendered = render(SCENARIOS["one-gpu"], values={"lifecycle.preStopSeconds": 0, "lifecycle.drainSeconds": 600})
    assert "lifecycle" not in rendered.server, "older API servers refuse to sleep for 0 s"
    assert rendered.template["spec"]["terminationGracePeriodSeconds"] == 625
    assert tomllib.loads(rendered.config_text)["drain_timeout_s"] == 600


@every
def test_probes_ask_the_plaintext_health_port(name: str) -> None:
    rendered = scenario(name)
    config = tomllib.loads(rendered.config_text)
    ports = {port["name"]: port["containerPort"] for port in rendered.server["ports"]}
    assert ports == {"grpc": config["port"], "health": config["health_port"], "metrics": config["metrics_port"]}
    for template in rendered.templates:
        (container,) = template["spec"]["containers"]
        asked = {probe: container[f"{probe}Probe"]["grpc"] for probe in ("startup", "readiness", "liveness")}
        for probe, grpc in asked.items():
            assert grpc == {"port": ports["health"], "service": probe}


@every
def test_loading_fits_into_the_rollout(name: str) -> None:
    rendered = scenario(name)
    probe = rendered.server["startupProbe"]
    budget = probe["failureThreshold"] * probe["periodSeconds"]
    assert budget >= values(name).get("probes", {}).get("startupBudgetSeconds", 1800)
    if rendered.workload["kind"] == "Deployment":
        download = 3600 if rendered.template["spec"].get("initContainers") else 0
        assert rendered.workload["spec"]["progressDeadlineSeconds"] > budget + download


def test_nodes_wait_for_those_that_still_download() -> None:
    hub = {"model.source": "huggingFace", "model.huggingFace.repository": "Qwen/Qwen3-32B", "model.path": ""}
    hub["model.huggingFace.revision"] = "9216db5781bf21249d130ec9da846c4624c16137"
    rendered = render(SCENARIOS["multi-node"], values=hub)
    probe = rendered.server["startupProbe"]
    assert tomllib.loads(rendered.config_text)["join_timeout_s"] == 1800 + 3600
    assert probe["failureThreshold"] * probe["periodSeconds"] == 1800 + 3600


@every
def test_ports_of_services_and_policies_exist(name: str) -> None:
    rendered = scenario(name)
    names = {port["name"] for port in rendered.server["ports"]}
    for service in rendered.of("Service"):
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in names
    assert set(by_port(rendered.one("NetworkPolicy")["spec"]["ingress"])) <= names
    for monitor in rendered.of("PodMonitor"):
        assert all(endpoint["port"] in names for endpoint in monitor["spec"]["podMetricsEndpoints"])
    for pool in rendered.of("InferencePool"):
        assert pool["spec"]["targetPorts"] == [{"number": tomllib.loads(rendered.config_text)["port"]}]


def test_service_monitor_finds_one_service() -> None:
    rendered = scenario("hpa")
    spec = rendered.one("ServiceMonitor")["spec"]
    found = [
        item for item in rendered.of("Service") if selects(spec["selector"]["matchLabels"], item["metadata"]["labels"])
    ]
    assert len(found) == 1
    assert {endpoint["port"] for endpoint in spec["endpoints"]} <= {port["name"] for port in found[0]["spec"]["ports"]}


@every
def test_routes_lead_to_what_is_there(name: str) -> None:
    rendered = scenario(name)
    for route in rendered.of("GRPCRoute"):
        for rule in route["spec"]["rules"]:
            assert "lightqwen.v1.AdminService" not in str(rule)
            for backend in rule["backendRefs"]:
                target = rendered.one(backend.get("kind", "Service"), backend["name"])
                if target["kind"] == "Service":
                    assert backend["port"] in [port["port"] for port in target["spec"]["ports"]]


@every
def test_scalers_own_the_replicas(name: str) -> None:
    rendered = scenario(name)
    scalers = [*rendered.of("ScaledObject"), *rendered.of("HorizontalPodAutoscaler")]
    assert len(scalers) == (1 if name in {"autoscaled", "hpa"} else 0)
    assert ("replicas" in rendered.workload["spec"]) is not bool(scalers)
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        workload = rendered.workload
        assert (target["apiVersion"], target["kind"]) == (workload["apiVersion"], workload["kind"])
        assert target["name"] == workload["metadata"]["name"]


def test_groups_are_scaled_as_groups() -> None:
    keda = {"replicaCount": None, "autoscaling.keda.enabled": True, "autoscaling.keda.serverAddress": "http://p:9090"}
    rendered = render(SCENARIOS["multi-node"], values=keda)
    assert "replicas" not in rendered.workload["spec"]
    assert rendered.one("ScaledObject")["spec"]["scaleTargetRef"] == {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "name": rendered.workload["metadata"]["name"],
    }


def test_a_lost_metric_is_never_zero_load() -> None:
    """KEDA reads a missing series as 0 unless told otherwise; without minReplicas of 0 and fallback, replicas stay."""
    rendered = scenario("autoscaled")
    spec = rendered.one("ScaledObject")["spec"]
    assert spec["minReplicaCount"] >= 1
    assert "fallback" not in spec
    release = {item["targetLabel"]: item["replacement"] for item in monitor_relabelings(rendered)}["release"]
    for trigger in spec["triggers"]:
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert trigger["metricType"] == "AverageValue"
        query = trigger["metadata"]["query"]
        assert query.count(f'namespace="{NAMESPACE}",release="{release}"') == query.count("{") == 2
        assert re.search(r"lightqwen_\w+", query)[0] in metric_names()  # type: ignore[index]


def test_what_keda_asks_is_the_load_of_all_replicas(tmp_path: Path) -> None:
    """In Prometheus' own words: with both replicas scraped, with one of them lost, and with none."""
    promtool = find_tool("promtool")
    ours = "namespace='inference', release='qwen'"
    for trigger in scenario("autoscaled").one("ScaledObject")["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        (metric,) = set(re.findall(r"lightqwen_\w+", query))
        series = {
            f"up{{job='lightqwen', {ours}, pod='a'}}": "1x9 0x9",
            f"up{{job='lightqwen', {ours}, pod='b'}}": "1x4 0x14",
            f"{metric}{{{ours}, pod='a'}}": "6x9 stale",
            f"{metric}{{{ours}, pod='b'}}": "2x4 stale",
            f"{metric}{{namespace='inference', release='other', pod='c'}}": "9x20",
        }
        expected = {"4m": [{"labels": "{}", "value": 8}], "9m": [{"labels": "{}", "value": 12}], "14m": []}
        case = {
            "interval": "1m",
            "input_series": [{"series": name, "values": told} for name, told in series.items()],
            "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": e} for at, e in expected.items()],
        }
        path = tmp_path / "case.yaml"
        path.write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}))
        done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


def test_hpa_asks_for_metrics_that_exist() -> None:
    metrics = [metric["pods"] for metric in scenario("hpa").one("HorizontalPodAutoscaler")["spec"]["metrics"]]
    assert {metric["metric"]["name"] for metric in metrics} <= metric_names()
    assert [metric["target"]["averageValue"] for metric in metrics] == ["8", "800m"]


def monitor_relabelings(rendered: Rendered) -> list[dict[str, str]]:
    (endpoint,) = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    return list(endpoint["relabelings"])


def metric_names() -> set[str]:
    """As the server's own registry has them."""
    from service.metrics import Metrics

    families = list(Metrics("model").registry.collect())
    return {family.name for family in families} | {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("name", ["autoscaled", "hpa"])
def test_scraped_series_are_those_that_the_rules_look_for(name: str) -> None:
    """The rules know servers by job="lightqwen" and the container lightqwen."""
    rendered = scenario(name)
    (monitor,) = [*rendered.of("PodMonitor"), *rendered.of("ServiceMonitor")]
    (endpoint,) = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
    assert {"targetLabel": "job", "replacement": "lightqwen"} in endpoint["relabelings"]
    assert {"targetLabel": "release", "replacement": RELEASE} in endpoint["relabelings"]
    text = "".join(path.read_text() for path in (CHART / "rules").glob("*.yaml"))
    assert set(re.findall(r'job="([^"]*)"', text)) <= {"lightqwen"}
    assert set(re.findall(r'container="([^"]*)"', text)) <= {rendered.server["name"]}


@every
def test_pods_are_restricted(name: str) -> None:
    """Pod Security "restricted", and more: no token, a read-only root, no environment of other Services."""
    for pod in scenario(name).pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert "memory" in container["resources"]["limits"]
        if name != "hpa":  # its weights lie on the nodes: the one source that "restricted" forbids
            assert not any("hostPath" in volume for volume in spec["volumes"])


@every
def test_what_is_written_is_a_volume(name: str) -> None:
    for pod in scenario(name).pods:
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= set(volumes)
            writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
            for variable in container["env"]:
                if variable["value"].startswith("/") and variable["name"] != "HF_TOKEN_PATH":
                    assert any(variable["value"].startswith(path) for path in writable), variable
            assert {"/tmp", "/cache"} <= writable
            if container["name"] == "fetch-model":
                target = container["command"][container["command"].index("--local-dir") + 1]
                assert any(target.startswith(path) for path in writable)
        if "shm" in volumes:
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


@every
def test_shared_memory_is_there_for_every_rank(name: str) -> None:
    mounts = {mount["mountPath"]: mount for mount in scenario(name).server["volumeMounts"]}
    assert mounts["/dev/shm"]["name"] == "shm"
    assert scenario(name).template_volume("shm")["emptyDir"]["sizeLimit"] == {
        "tensor-parallel": "8Gi",
        "multi-node": "16Gi",
        "cpu-demo": "256Mi",
    }.get(name, "2Gi")


@every
def test_files_of_the_configuration_are_mounted(name: str) -> None:
    """Every path that the server is told lies in a volume, and the volume is what the values name."""
    rendered = scenario(name)
    config = tomllib.loads(rendered.config_text)
    mounts = {mount["mountPath"] for mount in rendered.server["volumeMounts"] if mount.get("readOnly")}
    paths = [value for value in config.values() if isinstance(value, str) and value.startswith("/")]
    assert (name == "cpu-demo") is not bool(paths)
    for path in [*paths, rendered.server["command"][-1]]:
        assert any(f"{path}/".startswith(f"{mount}/") for mount in mounts), path


def test_secrets_come_from_secrets() -> None:
    rendered = scenario("tls")
    names = {volume["secret"]["secretName"] for volume in rendered.template["spec"]["volumes"] if "secret" in volume}
    assert names == {"lightqwen-tls", "clients-ca", "lightqwen-tokens", "lightqwen-admin-tokens"}
    config = tomllib.loads(rendered.config_text)
    assert config["tls_cert"] == "/etc/lightqwen/tls/tls.crt"
    assert config["tls_client_ca"] == "/etc/lightqwen/client-ca/ca.crt"
    assert config["auth_tokens_file"] == "/etc/lightqwen/tokens/tokens"
    assert config["admin_tokens_file"] == "/etc/lightqwen/admin-tokens/tokens"


@every
def test_the_test_pod_speaks_the_client_s_language(name: str) -> None:
    """Its command is one that the command line takes, and the files that it names are mounted."""
    from service.cli import build_parser

    (container,) = scenario(name).one("Pod")["spec"]["containers"]
    assert container["command"][0] == "lightqwen"
    told = build_parser().parse_args(container["command"][1:])
    assert (told.command, told.target) == ("generate", f"{RELEASE}-lightqwen.{NAMESPACE}.svc:50051")
    assert told.raw, "a checkpoint without a chat template is served too"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if mount.get("readOnly")}
    files = [path for path in (told.tls_ca, told.tls_cert, told.tls_key, told.token_file) if path]
    assert len(files) == (4 if name == "tls" else 0)
    assert {path.rpartition("/")[0] for path in files} == mounts


def test_the_test_pod_does_not_see_the_server_s_key() -> None:
    volumes = {volume["name"]: volume for volume in scenario("tls").one("Pod")["spec"]["volumes"]}
    assert volumes["authority"]["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert volumes["client"]["secret"]["secretName"] == "lightqwen-test-client"
    public = render(SCENARIOS["tls"], values={"helmTest.caKey": "", "helmTest.tlsServerName": "qwen.example.com"})
    command = public.one("Pod")["spec"]["containers"][0]["command"]
    assert "--tls" in command
    assert command[command.index("--tls-server-name") + 1] == "qwen.example.com"
    assert "lightqwen-tls" not in str(public.one("Pod"))


@every
def test_no_secret_is_rendered(name: str) -> None:
    rendered = scenario(name)
    assert rendered.of("Secret") == []
    for item in rendered.pods:
        for container in [*item["spec"]["containers"], *item["spec"].get("initContainers", [])]:
            for variable in container["env"]:
                if re.search(r"TOKEN|PASSWORD|SECRET|KEY", variable["name"]):
                    assert variable["value"].startswith("/etc/lightqwen/"), "a file of a Secret, and nothing else"


def test_h2c_is_said_where_it_is_true() -> None:
    for name, expected in (("one-gpu", "kubernetes.io/h2c"), ("tls", None)):
        service = scenario(name).one("Service", f"{RELEASE}-lightqwen")
        assert service["spec"]["ports"][0].get("appProtocol") == expected


def test_headless_service_resolves_to_ready_pods_only() -> None:
    spec = scenario("one-gpu").one("Service", f"{RELEASE}-lightqwen-headless")["spec"]
    assert spec["clusterIP"] == "None"
    assert not spec.get("publishNotReadyAddresses", False)


def by_port(rules: list[Object]) -> dict[Any, Object]:
    """A policy's rules by the ports that they name."""
    return {port["port"]: rule for rule in rules for port in rule["ports"] if "port" in port}


@every
def test_network_policy_lets_in_what_is_needed(name: str) -> None:
    rendered = scenario(name)
    spec = rendered.one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    rules = by_port(spec["ingress"])
    assert set(rules) == {"grpc", "metrics", "health"}
    assert "from" not in rules["health"], "the kubelet is no pod"
    assert all(rules[port]["from"] for port in ("grpc", "metrics")), "an empty list would let everybody in"
    of_test = rendered.one("Pod")["metadata"]["labels"]
    peers = [peer["podSelector"]["matchLabels"] for peer in rules["grpc"]["from"] if peer.get("podSelector")]
    assert any(selects(peer, of_test) for peer in peers), "helm test is let in"
    outward = set(by_port(spec["egress"]))
    assert outward == ({53, 443} if rendered.template["spec"].get("initContainers") else {53})


@every
def test_network_policy_lets_the_nodes_of_a_group_meet_and_nobody_else(name: str) -> None:
    rendered = scenario(name)
    spec = rendered.one("NetworkPolicy")["spec"]
    any_port = [
        (rule["ports"], rule.get("from", rule.get("to")))
        for rule in [*spec["ingress"], *spec["egress"]]
        if any("port" not in port for port in rule.get("ports", [{}]))
    ]
    if name != "multi-node":
        assert any_port == []
        return
    assert len(any_port) == 2, "one in, one out"
    for ports, peers in any_port:
        assert ports == [{"protocol": "TCP"}]
        ((kind, selector),) = [item for peer in peers for item in peer.items()]
        assert kind == "podSelector", "of this namespace"
        assert all(selects(selector["matchLabels"], labels) for labels in labels_of_pods(rendered))
        assert not selects(selector["matchLabels"], rendered.one("Pod")["metadata"]["labels"])
        other = labels_of_pods(render(SCENARIOS[name], release="another", version=oldest_for(name)))
        assert not any(selects(selector["matchLabels"], labels) for labels in other)


def test_nobody_is_not_everybody() -> None:
    """To Kubernetes, a rule with an empty list of peers is open to all."""
    nobody = {"networkPolicy.clients": [], "networkPolicy.monitoring": []}
    for values, ports in ((nobody, {"grpc", "health"}), (nobody | {"helmTest.enabled": False}, {"health"})):
        spec = render(SCENARIOS["one-gpu"], values=values).one("NetworkPolicy")["spec"]
        rules = by_port(spec["ingress"])
        assert set(rules) == ports
        assert all(rule["from"] for port, rule in rules.items() if port != "health")


@every
@pytest.mark.parametrize("release", ["r" * 53, "123", "true"])
def test_names_fit_and_stay_text(name: str, release: str) -> None:
    rendered = render(SCENARIOS[name], release=release, version=oldest_for(name))
    for item in rendered:
        limit = 253 if item["kind"] in {"ConfigMap", "PrometheusRule"} else 63
        assert isinstance(item["metadata"]["name"], str), item
        assert len(item["metadata"]["name"]) <= limit, item["metadata"]["name"]
        for pod in (item, *rendered.templates):
            for value in pod["metadata"].get("labels", {}).values():
                assert isinstance(value, str)
                assert len(value) <= 63
    assert len(rendered.workload["metadata"]["name"]) <= 52, "controllers add suffixes of up to 11 characters"


@every
def test_no_annotation_or_environment_variable_is_a_number(name: str) -> None:
    for item in scenario(name):
        for leaf in leaves(item):
            if "annotations" in leaf.path or "labels" in leaf.path or (leaf.path[-1] == "value" and "env" in leaf.path):
                assert isinstance(leaf.value, str), leaf


@every
def test_a_changed_configuration_rolls_the_pods(name: str) -> None:
    version = oldest_for(name)
    before = scenario(name)
    after = render(SCENARIOS[name], values={"config.max_running": 17}, version=version)
    same = render(SCENARIOS[name], values={"service.annotations": {"a": "b"}}, version=version)
    assert tomllib.loads(after.config_text)["max_running"] == 17
    assert after.template["metadata"]["annotations"] != before.template["metadata"]["annotations"]
    assert same.template == before.template


@every
def test_a_new_chart_version_alone_rolls_nothing(name: str) -> None:
    for template in scenario(name, NEWEST).templates:
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(template["metadata"]["labels"])


@every
def test_the_server_takes_its_configuration(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendered file, read by the server's own code: every key exists, every value is in range."""
    from service.config import load_config

    for key, value in {"LWS_LEADER_ADDRESS": "leader", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}.items():
        if name == "multi-node":
            monkeypatch.setenv(key, value)
    path = tmp_path / "server.toml"
    path.write_text(scenario(name).config_text)
    config = load_config(["--config", str(path)])
    told = tomllib.loads(scenario(name).config_text)
    assert {key: getattr(config, key) for key in told} == {
        key: type(getattr(config, key))(value) for key, value in told.items()
    }
    if name == "multi-node":
        assert (config.node_rank, config.leader_address) == (1, "leader")


def test_one_option_is_as_good_as_another() -> None:
    """Text, numbers and switches, as TOML reads them back."""
    odd = {"served": 'a "quoted" \\ <name> ü', "count": 1048576, "share": 0.92, "flag": False}
    told = tomllib.loads(render(SCENARIOS["one-gpu"], values={"config": odd}).config_text)
    assert {key: told[key] for key in odd} == odd
    assert isinstance(told["count"], int)


def values(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SCENARIOS[name].read_text())
    return found


def test_each_volume_is_what_its_source_says() -> None:
    volumes = {name: scenario(name).template_volume("models") for name in SCENARIOS if name != "cpu-demo"}
    assert volumes["one-gpu"]["persistentVolumeClaim"] == {"claimName": "qwen3-weights", "readOnly": True}
    assert volumes["tensor-parallel"]["persistentVolumeClaim"] == {"claimName": "qwen-lightqwen-models"}
    assert volumes["autoscaled"]["persistentVolumeClaim"] == {"claimName": "shared-weights"}
    assert volumes["hpa"]["hostPath"] == {"path": "/var/lib/models", "type": "Directory"}
    assert "@sha256:" in volumes["multi-node"]["image"]["reference"]
    alone = render(SCENARIOS["tensor-parallel"], values={"model.huggingFace.storage.size": ""})
    assert alone.template_volume("models")["emptyDir"] == {}
    assert alone.of("PersistentVolumeClaim") == []


def test_kernels_are_kept_on_their_claim_where_the_server_looks_for_them() -> None:
    rendered = scenario("autoscaled")
    assert rendered.template_volume("kernels")["persistentVolumeClaim"] == {"claimName": "shared-kernels"}
    (mount,) = (mount for mount in rendered.server["volumeMounts"] if mount["name"] == "kernels")
    assert {"name": "TRITON_CACHE_DIR", "value": mount["mountPath"]} in rendered.server["env"]
    assert not mount.get("readOnly"), "the first pod fills it"
    for container in rendered.template["spec"]["initContainers"]:
        assert "kernels" not in {mount["name"] for mount in container["volumeMounts"]}
    assert "kernels" not in {mount["name"] for mount in scenario("one-gpu").server["volumeMounts"]}
    group = render(SCENARIOS["multi-node"], values={"kernelCache.claimName": "shared-kernels"})
    assert len(group.templates) == 2
    for template in group.templates:
        mounts = {mount["name"]: mount for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["kernels"] == mount


def test_a_claim_of_the_chart_outlives_the_release() -> None:
    claim = scenario("tensor-parallel").one("PersistentVolumeClaim", "qwen-lightqwen-models")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_model_from_the_hub_is_pinned_and_then_offline() -> None:
    rendered = scenario("tensor-parallel")
    (fetch,) = rendered.template["spec"]["initContainers"]
    revision = "9216db5781bf21249d130ec9da846c4624c16137"
    assert fetch["command"][fetch["command"].index("--revision") + 1] == revision
    assert fetch["image"] == rendered.server["image"]
    assert revision in tomllib.loads(rendered.config_text)["model"], "another commit is another folder"
    assert {"name": "HF_TOKEN_PATH", "value": "/etc/lightqwen/hub-token/token"} in fetch["env"]
    assert rendered.template_volume("hub-token")["secret"]["secretName"] == "hub-token"
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in rendered.server["env"]
    assert "hub-token" not in {mount["name"] for mount in rendered.server["volumeMounts"]}, "the server needs no token"


def test_image_digest_goes_before_tag() -> None:
    digest = "sha256:" + "0" * 64
    image = {"image.repository": "r.example.com/lq", "image.tag": "1.2", "image.digest": digest}
    assert render(SCENARIOS["one-gpu"], values=image).server["image"] == f"r.example.com/lq@{digest}"
    assert scenario("one-gpu").server["image"] == "lightqwen:0.1.0-cuda"
    assert scenario("cpu-demo").server["image"] == "lightqwen:0.1.0-cpu"


def test_a_deployment_rolls_within_the_gpus_it_has() -> None:
    assert scenario("one-gpu").workload["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    recreate = render(SCENARIOS["one-gpu"], values={"strategy.type": "Recreate"})
    assert recreate.workload["spec"]["strategy"] == {"type": "Recreate"}


def test_monitors_by_themselves_follow_the_cluster() -> None:
    known = ["monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule"]
    without = render(SCENARIOS["one-gpu"])
    having = render(SCENARIOS["one-gpu"], apis=known)
    assert not without.of("PodMonitor")
    assert not without.of("PrometheusRule")
    assert len(having.of("PodMonitor")) == 1
    assert having.of("PrometheusRule")


def test_extras_are_rendered() -> None:
    extra: dict[str, Any] = {
        "extraObjects": ["apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}-more"],
        "extraEnv": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "extraInitContainers": [{"name": "first", "image": "busybox"}],
        "podLabels": {"team": "inference"},
        "commonLabels": {"cost-center": "42a"},
        "nodeSelector": {"gpu": "h200"},
        "priorityClassName": "high",
    }
    rendered = render(SCENARIOS["tensor-parallel"], values=extra)
    assert rendered.one("ConfigMap", f"{RELEASE}-more")
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in rendered.server["env"]
    assert [item["name"] for item in rendered.template["spec"]["initContainers"]] == ["first", "fetch-model"]
    assert {"name": "more", "mountPath": "/more"} in rendered.server["volumeMounts"]
    assert rendered.template["metadata"]["labels"]["team"] == "inference"
    assert rendered.template["spec"]["nodeSelector"] == {"gpu": "h200"}
    assert rendered.template["spec"]["priorityClassName"] == "high"
    ours: list[Object] = [item for item in rendered if not item["metadata"]["name"].endswith("-more")]
    assert all(item["metadata"]["labels"]["cost-center"] == "42a" for item in ours)
