"""Strict schemas of everything that the chart renders. An object of an unknown kind is an error, not a pass.

- Kubernetes' own objects: the schemas of the package kubernetes-validate, with no field beyond those of that version.
- PodMonitor, ServiceMonitor, PrometheusRule, ScaledObject, GRPCRoute: the npm packages @kubernetes-models, twice. Their
  validators hold types, patterns and enumerations; the TypeScript compiler holds that there is no unknown field.
- LeaderWorkerSet, InferencePool: no package has them. The schemas in schemas/ are our own, closed, and hold only the
  fields that the chart uses, after the two projects' API references.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tests.helm.chart import TOOLS, Object

OWN = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): "leaderworkerset.json",
    ("inference.networking.k8s.io/v1", "InferencePool"): "inferencepool.json",
}
MODELS = {
    ("monitoring.coreos.com/v1", "PodMonitor"): "prometheus-operator",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "prometheus-operator",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "prometheus-operator",
    ("keda.sh/v1alpha1", "ScaledObject"): "keda",
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): "gateway-api",
}


def kind_of(item: Object) -> tuple[str, str]:
    return item["apiVersion"], item["kind"]


def problems(item: Object, version: str) -> list[str]:
    """What is wrong with one object, apart from those of `MODELS`, which `model_problems` takes all together."""
    if kind_of(item) in MODELS:
        return []
    if kind_of(item) in OWN:
        found = _own(OWN[kind_of(item)]).iter_errors(item)
        templates = item["spec"].get("leaderWorkerTemplate", {})
        pods = [templates[key] for key in ("leaderTemplate", "workerTemplate") if key in templates]
        wrapped = [{"apiVersion": "v1", "kind": "PodTemplate", "template": pod} for pod in pods]
        below = [problem for pod in wrapped for problem in problems(pod, version)]
        return [_readable(item, error) for error in found] + below
    return [_readable(item, error) for error in _kubernetes(version, *kind_of(item)).iter_errors(item)]


def _readable(item: Object, error: Any) -> str:
    name = item.get("metadata", {}).get("name")
    return f"{item['kind']}/{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"


@cache
def _own(file: str) -> Any:
    import jsonschema

    return jsonschema.Draft7Validator(json.loads((Path(__file__).parent / "schemas" / file).read_text()))


@cache
def _definitions(version: str) -> tuple[Path, Any]:
    import kubernetes_validate
    import referencing

    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{version}-local-strict"
    return folder, referencing.Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))


@cache
def _kubernetes(version: str, api: str, kind: str) -> Any:
    import jsonschema
    import referencing

    folder, definitions = _definitions(version)
    group = re.sub(
        r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api
    )  # policy/v1: policy-v1; rbac.authorization.k8s.io/v1: rbac-v1
    schema = json.loads((folder / f"{kind.lower()}-{group}.json").read_text())
    registry = definitions @ referencing.Registry()
    return jsonschema.Draft202012Validator(schema, registry=registry)


def model_problems(items: Iterable[Object], scratch: Path) -> list[str]:
    """What is wrong with the objects of `MODELS`: one run of node and one of the TypeScript compiler for all."""
    models = [item for item in items if kind_of(item) in MODELS]
    lines, checks = [], []
    for index, item in enumerate(models):
        api, kind = kind_of(item)
        source = json.dumps(f"@kubernetes-models/{MODELS[kind_of(item)]}/{api}/{kind}")
        text = json.dumps(item, ensure_ascii=True)
        lines += [f"import type {{ I{kind} as T{index} }} from {source};", f"export const o{index}: T{index} = {text};"]
        checks += [
            f"import {{ {kind} as M{index} }} from {source};",
            f"try {{ new M{index}({text}).validate(); }} catch (e) {{ console.log('{kind}: ' + e.message); }}",
        ]
    (scratch / "node_modules").symlink_to(TOOLS / "node_modules")
    (scratch / "package.json").write_text('{"type": "module"}')
    (scratch / "objects.ts").write_text("\n".join(lines))
    (scratch / "objects.mjs").write_text("\n".join(checks))
    compiler = [TOOLS / "node_modules" / ".bin" / "tsc", "--noEmit", "--strict", "--skipLibCheck"]
    typed = _run([*compiler, "--module", "nodenext", "--target", "es2022", "objects.ts"], scratch, (0, 2))
    valid = _run(["node", "objects.mjs"], scratch, (0,))
    return [*typed.splitlines(), *valid.splitlines()]


def _run(command: list[Any], folder: Path, fine: tuple[int, ...]) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode in fine, done.stdout + done.stderr
    return done.stdout
