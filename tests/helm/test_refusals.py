"""What cannot work is refused before anything is installed, and the refusal says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helm.chart import CHART, SCENARIOS, helm, render, try_template

KEDA = {"autoscaling.keda.enabled": True, "autoscaling.keda.serverAddress": "http://prometheus:9090"}
HUB = {
    "model.source": "huggingFace",
    "model.path": "",
    "model.huggingFace.repository": "Qwen/Qwen3-8B",
    "model.huggingFace.revision": "b968826d9c46dd6066d109eabc6255188de91218",
}
OCI = {"model.source": "oci", "model.oci.reference": f"r.example.com/m@sha256:{'0' * 64}"}
CLAIM = HUB | {"model.huggingFace.storage.size": "100Gi"}

# Values on top of an installation that works, and a part of the sentence that refuses them.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"model.source": ""}, "model.source is missing"),
    "no claim": ({"model.pvc.claimName": ""}, "model.pvc.claimName is missing"),
    "no folder": ({"model.source": "hostPath"}, "model.hostPath.path is missing"),
    "no reference": ({"model.source": "oci"}, "model.oci.reference is missing"),
    "no repository": (HUB | {"model.huggingFace.repository": ""}, "model.huggingFace.repository is missing"),
    "no revision": (HUB | {"model.huggingFace.revision": ""}, "pin a commit"),
    "a path on the hub": (HUB | {"model.path": "x"}, "model.path belongs to"),
    "two claims": (CLAIM | {"model.huggingFace.storage.claimName": "c"}, "exclude each other"),
    "a claim for one pod": (CLAIM | {"replicaCount": 2}, "must have ReadWriteMany"),
    "a claim for one pod, scaled": (CLAIM | KEDA | {"podMonitor.enabled": True}, "must have ReadWriteMany"),
    "no name": ({"model.path": ""}, "model.name is missing"),
    "three GPUs on two nodes": (
        {"engine.tensorParallelSize": 3, "engine.nodes": 2},
        "engine.tensorParallelSize (3) does not divide by engine.nodes (2)",
    ),
    "fewer GPUs than nodes": (
        {"engine.tensorParallelSize": 1, "engine.nodes": 2},
        "does not divide by engine.nodes (2)",
    ),
    "GPUs by hand": ({"resources.limits": {"nvidia.com/gpu": 2}}, "resources.limits has nvidia.com/gpu"),
    "a topology without a group": ({"leaderWorkerSet.exclusiveTopologyKey": "rack"}, "there is no group"),
    "the port by hand": ({"config.port": 1}, "config.port is the chart's to decide"),
    "the drain by hand": ({"config.drain_timeout_s": 1}, "config.drain_timeout_s is the chart's to decide"),
    "the leader's port by hand": ({"config.leader_port": 1}, "config.leader_port is the chart's to decide"),
    "the rank by hand": ({"config.node_rank": 1}, "config.node_rank is the chart's to decide"),
    "certificates by hand": ({"config.tls_cert": "/x"}, "config.tls_cert is the chart's to decide"),
    "both scalers": (KEDA | {"autoscaling.hpa.enabled": True}, "both enabled: two scalers"),
    "replicas under KEDA": (KEDA | {"replicaCount": 2}, "replicaCount is set and a scaler is enabled"),
    "no replicas under an HPA": (
        {"autoscaling.hpa.enabled": True, "replicaCount": 0},
        "replicaCount is set and a scaler is enabled",
    ),
    "more at least than at most": (KEDA | {"autoscaling.minReplicas": 5}, "autoscaling.minReplicas (5) is more than"),
    "KEDA without Prometheus": ({"autoscaling.keda.enabled": True}, "autoscaling.keda.serverAddress is missing"),
    "a scaler without metrics": (KEDA | {"podMonitor.enabled": False}, "it would have no metrics"),
    "two monitors": ({"podMonitor.enabled": True, "serviceMonitor.enabled": True}, "counted twice"),
    "TLS without a certificate": ({"tls.enabled": True}, "tls.secretName is missing"),
    "client certificates without TLS": ({"tls.clientCaSecretName": "ca"}, "no client would be asked"),
    "tokens for administrators only": ({"auth.adminTokensSecretName": "t"}, "every other call would be open"),
    "tokens, and none for the test": ({"auth.tokensSecretName": "t"}, "helmTest.tokenSecretName is missing"),
    "client certificates, and none for the test": (
        {"tls.enabled": True, "tls.secretName": "s", "tls.clientCaSecretName": "ca"},
        "helmTest.clientCertSecretName is missing",
    ),
    "a token that nobody asks for": ({"helmTest.tokenSecretName": "t"}, "no caller needs a token"),
    "a route from nowhere": ({"grpcRoute.enabled": True}, "grpcRoute.parentRefs is missing"),
    "a pool without a picker": ({"inferencePool.enabled": True}, "inferencePool.endpointPicker.name is missing"),
    "a pool and TLS": (
        {
            "inferencePool.enabled": True,
            "inferencePool.endpointPicker.name": "p",
            "tls.enabled": True,
            "tls.secretName": "s",
        },
        "plaintext HTTP/2",
    ),
    "one port twice": ({"ports.health": 50051}, "must differ"),
    "the port where nodes meet, twice": ({"ports.leader": 9464}, "must differ"),
    "an alert that is none": (
        {"prometheusRule.disabledAlerts": ["LightqwenServerDown", "LightqwenSeverDown"]},
        "prometheusRule.disabledAlerts has LightqwenSeverDown, which is no alert: there are LightqwenServiceDown, ",
    ),
    "an option in the environment": ({"extraEnv": [{"name": "LIGHTQWEN_PORT", "value": "1"}]}, "belong to config"),
    "a secret in the open": ({"extraEnv": [{"name": "HF_TOKEN", "value": "hf_x"}]}, "use valueFrom.secretKeyRef"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    values, words = REFUSED[case]
    done = try_template(SCENARIOS["one-gpu"], values=values)
    assert done.returncode != 0
    assert words in done.stderr
    assert done.stdout == ""


def test_what_the_refusals_start_from_works() -> None:
    for values in (HUB, CLAIM, KEDA, OCI | {"model.name": "m"}):
        assert len(render(SCENARIOS["one-gpu"], values=values)) > 5
    shared = {"replicaCount": 2, "model.huggingFace.storage.accessModes": ["ReadWriteMany"]}
    assert render(SCENARIOS["one-gpu"], values=CLAIM | shared).one("PersistentVolumeClaim")
    fine = [{"name": "TOKENIZERS_PARALLELISM", "value": "false"}, {"name": "LIGHTQWEN_WITHOUT", "value": "pdl"}]
    environment = render(SCENARIOS["one-gpu"], values={"extraEnv": fine}).server["env"]
    assert all(variable in environment for variable in fine)
    secret = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
    assert secret[0] in render(SCENARIOS["one-gpu"], values={"extraEnv": secret}).server["env"]


def test_images_as_volumes_need_a_kubernetes_that_has_them() -> None:
    """An older API server would drop the field and say nothing."""
    done = try_template(SCENARIOS["one-gpu"], values=OCI, version="1.30.4")
    assert done.returncode != 0
    assert "Kubernetes v1.30.4 has no volumes from images" in done.stderr
    assert render(SCENARIOS["one-gpu"], values=OCI, version="1.31.0").template_volume("models")["image"]


def test_an_older_kubernetes_is_refused() -> None:
    done = try_template(SCENARIOS["one-gpu"], version="1.29.9")
    assert done.returncode != 0
    assert "kubeVersion" in done.stderr


def test_every_problem_is_told_at_once() -> None:
    done = try_template(values={"tls.enabled": True, "engine.nodes": 2})
    for words in ("model.source is missing", "does not divide", "tls.secretName is missing"):
        assert words in done.stderr


# Values that the closed schema refuses, and what its message names.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown at the root": ({"replicas": 2}, "replicas"),
    "unknown below": ({"engine.tensorParalelSize": 2}, "tensorParalelSize"),
    "unknown far below": ({"model.huggingFace.storage.sise": "1Gi"}, "sise"),
    "half a GPU": ({"engine.tensorParallelSize": 0.5}, "tensorParallelSize"),
    "no GPU": ({"engine.tensorParallelSize": 0}, "tensorParallelSize"),
    "text for a number": ({"engine.nodes": "2"}, "nodes"),
    "another device": ({"engine.device": "tpu"}, "device"),
    "another source": ({"model.source": "s3"}, "source"),
    "a branch": (HUB | {"model.huggingFace.revision": "main"}, "revision"),
    "a path out of the volume": ({"model.path": "../etc"}, "path"),
    "an image without a digest": ({"model.oci.reference": "r.example.com/m:1"}, "reference"),
    "a short digest": ({"image.digest": "sha256:12"}, "digest"),
    "a tag with a space": ({"image.tag": "a b"}, "tag"),
    "none at least": ({"autoscaling.minReplicas": 0}, "minReplicas"),
    "more than all of the cache": ({"autoscaling.kvCacheUsage": 1.5}, "kvCacheUsage"),
    "less than no drain": ({"lifecycle.drainSeconds": -1}, "drainSeconds"),
    "no time to end": ({"lifecycle.marginSeconds": 0}, "marginSeconds"),
    "a port for root": ({"ports.grpc": 443}, "grpc"),
    "no such port": ({"ports.grpc": 70000}, "grpc"),
    "a size in words": ({"cacheSizeLimit": "ten"}, "cacheSizeLimit"),
    "a claim that cannot have its name": ({"kernelCache.claimName": "My_Claim"}, "kernelCache.claimName"),
    "nested configuration": ({"config": {"a": {"b": 1}}}, "config"),
    "a flag for an option": ({"config": {"--max-running": 1}}, "config"),
    "monitor perhaps": ({"podMonitor.enabled": "perhaps"}, "podMonitor"),
    "a number for a label": ({"podLabels": {"team": 7}}, "team"),
    "a label of ours": ({"podLabels": {"app.kubernetes.io/name": "x"}}, "podLabels"),
    "a label of ours, everywhere": ({"commonLabels": {"app.kubernetes.io/instance": "x"}}, "commonLabels"),
    "a claim's name in capitals": ({"model.pvc.claimName": "Weights"}, "claimName"),
    "an interval without a unit": ({"podMonitor.interval": "15"}, "interval"),
    "a Prometheus that is no address": ({"autoscaling.keda.serverAddress": "prometheus:9090"}, "serverAddress"),
    "a variable without a name": ({"extraEnv": [{"value": "x"}]}, "name"),
    "a number in the environment": ({"extraEnv": [{"name": "N", "value": 1}]}, "value"),
    "nothing to ask": ({"helmTest.prompt": ""}, "prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_schema_refuses(case: str) -> None:
    values, names = WRONG[case]
    done = try_template(SCENARIOS["one-gpu"], values=values)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert names in done.stderr


def test_the_schema_is_draft_7_and_closed() -> None:
    """Every object says what may be in it: no more names, or names after a rule, or it is Kubernetes' own to judge."""
    import jsonschema

    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["additionalProperties"] is False
    kubernetes_judges = {
        "affinity",
        "podSecurityContext",
        "securityContext",
        "scaleUp",
        "scaleDown",
        "valueFrom",
        "global",
    }

    def open_ones(node: Any, name: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        found = [child for key, value in node.get("properties", {}).items() for child in open_ones(value, key)]
        for key, value in node.get("definitions", {}).items():
            found += open_ones(value, key)
        if node.get("type") == "object" and "additionalProperties" not in node:
            found.append(name)
        return found

    assert set(open_ones(schema, "")) == kubernetes_judges


def test_the_schema_knows_every_value() -> None:
    """As many names in values.yaml as in the schema, at every level."""
    import yaml

    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: dict[str, Any], node: dict[str, Any], path: str) -> None:
        known = set(node["properties"]) - {"global"}
        assert set(values) == known, path
        for key, value in values.items():
            if isinstance(value, dict) and "properties" in node["properties"][key]:
                compare(value, node["properties"][key], f"{path}.{key}")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_the_chart_lints_without_values() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART).stdout
