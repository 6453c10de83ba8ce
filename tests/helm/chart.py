"""The chart as the tests see it: where its tools are, how it is rendered, and what is looked for in the result."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "lightqwen"
TOOLS = ROOT / "build" / "tools" / "chart"
HELM = TOOLS / "node_modules" / ".bin" / "helm"

SCENARIOS = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
OLDEST, MIDDLE, NEWEST = "1.30.0", "1.33.0", "1.37.0"
RELEASE, NAMESPACE = "qwen", "inference"

Object = dict[str, Any]


def why_no_tools() -> str | None:
    """Why the chart cannot be tested here, or None when it can."""
    if (TOOLS / ".installed").exists():
        return None
    reason = TOOLS / "missing"
    return reason.read_text().strip() if reason.exists() else "its tools are not installed (make test-helm does that)"


def oldest_for(scenario: str) -> str:
    """The oldest Kubernetes that a scenario is for: volumes from images came with 1.31."""
    return "1.31.0" if scenario == "multi-node" else OLDEST


def helm(*arguments: str | Path, home: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run helm; nothing of the user's own configuration is seen."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home or "/nonexistent")}
    done = subprocess.run(
        [HELM, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


class Rendered(list[Object]):
    """The objects of one rendering."""

    def of(self, kind: str) -> list[Object]:
        return [item for item in self if item["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Object:
        found = [item for item in self.of(kind) if name is None or item["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} objects of kind {kind}, named {name}"
        return found[0]

    @property
    def workload(self) -> Object:
        found = [*self.of("Deployment"), *self.of("LeaderWorkerSet")]
        assert len(found) == 1
        return found[0]

    @property
    def templates(self) -> list[Object]:
        """The workload's pod templates, as LeaderWorkerSet's controller completes them."""
        spec = self.workload["spec"]
        if self.workload["kind"] == "Deployment":
            return [spec["template"]]
        group = spec["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]

    @property
    def template(self) -> Object:
        return self.templates[0]

    @property
    def server(self) -> Object:
        (container,) = self.template["spec"]["containers"]
        return dict(container)

    @property
    def config_text(self) -> str:
        return str(self.one("ConfigMap", self.template_volume("config")["configMap"]["name"])["data"]["server.toml"])

    def template_volume(self, name: str) -> Object:
        (volume,) = (volume for volume in self.template["spec"]["volumes"] if volume["name"] == name)
        return dict(volume)

    @property
    def pods(self) -> list[Object]:
        """Pod templates, and pods of their own such as that of `helm test`."""
        return [*self.templates, *self.of("Pod")]


def flags(values: dict[str, Any] | None) -> list[str]:
    """Values as `--set-json`, for each key on its own."""
    return [part for key, value in (values or {}).items() for part in ("--set-json", f"{key}={json.dumps(value)}")]


def try_template(
    *files: Path,
    values: dict[str, Any] | None = None,
    version: str = MIDDLE,
    apis: Iterable[str] = (),
    release: str = RELEASE,
) -> subprocess.CompletedProcess[str]:
    """`helm template`, which may refuse."""
    arguments: list[str | Path] = ["template", release, CHART, "--namespace", NAMESPACE, "--kube-version", version]
    for file in files:
        arguments += ["--values", file]
    for api in apis:
        arguments += ["--api-versions", api]
    return helm(*arguments, *flags(values), check=False)


def render(*files: Path, **options: Any) -> Rendered:
    """`helm template`, as objects."""
    done = try_template(*files, **options)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def parse(text: str) -> Rendered:
    return Rendered(item for item in yaml.load_all(text, Loader=UniqueLoader) if item is not None)


@cache
def scenario(name: str, version: str | None = None) -> Rendered:
    """One of the chart's examples; shared between tests, which leave it as it is."""
    return render(SCENARIOS[name], version=version or oldest_for(name))


class UniqueLoader(yaml.CSafeLoader):
    """YAML that refuses a key which is there twice: the API server would, and PyYAML would take the last."""


def _unique(loader: UniqueLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    assert not twice, f"keys given twice: {twice}, {node.start_mark}"
    return loader.construct_mapping(node, deep=True)


UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)


@dataclass(frozen=True)
class Leaf:
    """A scalar of an object, and where it is."""

    path: tuple[str | int, ...]
    value: Any


def leaves(item: Any, path: tuple[str | int, ...] = ()) -> Iterator[Leaf]:
    """Every scalar below an object."""
    if isinstance(item, dict):
        for key, value in item.items():
            yield from leaves(value, (*path, key))
    elif isinstance(item, list):
        for index, value in enumerate(item):
            yield from leaves(value, (*path, index))
    else:
        yield Leaf(path, item)
