"""Every example, rendered for several versions of Kubernetes, is what their API servers take: no field too many."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.helm.chart import CHART, MIDDLE, NEWEST, SCENARIOS, helm, oldest_for, scenario
from tests.helm.schemas import MODELS, OWN, kind_of, model_problems, problems

NAMED = {"one-gpu", "tensor-parallel", "multi-node", "autoscaled", "hpa", "tls", "cpu-demo"}


def test_every_kind_of_installation_has_an_example() -> None:
    assert set(SCENARIOS) >= NAMED


@pytest.mark.parametrize("name", SCENARIOS)
def test_lint(name: str) -> None:
    done = helm("lint", "--strict", CHART, "--values", SCENARIOS[name])
    assert "0 chart(s) failed" in done.stdout


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("version", ["oldest", MIDDLE, NEWEST])
def test_objects_are_valid(name: str, version: str) -> None:
    version = oldest_for(name) if version == "oldest" else version
    rendered = scenario(name, version)
    assert len(rendered) > 5
    assert [problem for item in rendered for problem in problems(item, version)] == []


def everything() -> list[dict[str, Any]]:
    return [item for name in SCENARIOS for item in scenario(name)]


def test_custom_resources_are_valid(tmp_path: Path) -> None:
    """All of them at once: node starts twice."""
    items = everything()
    assert {kind_of(item) for item in items} >= {*MODELS, *OWN}
    assert model_problems(items, tmp_path) == []


def test_the_checks_of_custom_resources_find_mistakes(tmp_path: Path) -> None:
    """One wrong type, one unknown field and one wrong pattern in each kind would be found."""
    broken = []
    for wanted in MODELS:
        item = copy.deepcopy(next(item for item in everything() if kind_of(item) == wanted))
        item["spec"]["unheardOf"] = True
        broken.append(item)
        wrong = copy.deepcopy(next(item for item in everything() if kind_of(item) == wanted))
        wrong["metadata"]["name"] = 7
        broken.append(wrong)
    found = "\n".join(model_problems(broken, tmp_path))
    assert found.count('"unheardOf"') == len(MODELS)
    for _, kind in MODELS:
        assert f"{kind}: data/metadata/name must be string" in found


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("multi-node", "LeaderWorkerSet", lambda spec: spec.update(unheardOf=1)),
        ("multi-node", "LeaderWorkerSet", lambda spec: spec["leaderWorkerTemplate"].update(size="2")),
        (
            "multi-node",
            "LeaderWorkerSet",
            lambda spec: spec["leaderWorkerTemplate"]["leaderTemplate"]["spec"].update(x=1),
        ),
        ("autoscaled", "InferencePool", lambda spec: spec.update(appProtocol="grpc")),
        ("one-gpu", "Deployment", lambda spec: spec["template"]["spec"].update(unheardOf=1)),
        ("one-gpu", "PodDisruptionBudget", lambda spec: spec.update(maxUnavailabel=1)),
    ],
)
def test_the_other_checks_find_mistakes(name: str, kind: str, change: Any) -> None:
    item = copy.deepcopy(scenario(name).one(kind))
    assert problems(item, MIDDLE) == []
    change(item["spec"])
    assert problems(item, MIDDLE) != []


def test_an_unknown_kind_is_no_pass() -> None:
    with pytest.raises(FileNotFoundError):
        problems({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}}, MIDDLE)
