"""The Dockerfile and docker-compose.yml, as far as they can be checked without an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from model.published import SIZES, split_share
from service.config import load_config
from tests.observability.conftest import Promtool
from tests.observability.expressions import load_dashboards

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((root / "docker-compose.yml").read_text())
    return loaded


def instructions(root: Path) -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), lines joined."""
    lines = [line for line in (root / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(parts[0], parts[2]) for line in joined.splitlines() if (parts := line.strip().partition(" "))[0]]


def mounts(compose: dict[str, Any], service: str) -> dict[str, str]:
    """Path in the container of each file or folder of ours: its path in the project."""
    found = {}
    for volume in compose["services"][service].get("volumes", []):
        source, target = volume.split(":")[:2]
        if source.startswith("."):
            found[target] = source
    return found


# ---- the image -------------------------------------------------------------------------------------------------------


def test_hadolint_passes_the_dockerfile(root: Path) -> None:
    done = subprocess.run([BIN / "hadolint", root / "Dockerfile"], capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_end_as_a_user_without_rights_who_can_be_told_by_number(root: Path) -> None:
    users: dict[str, str] = {}
    stage = ""
    for name, arguments in instructions(root):
        if name == "FROM":
            base, _, stage = arguments.partition(" AS ")
            users[stage] = users.get(base, "")
        elif name == "USER":
            users[stage] = arguments
    assert (users["cpu"], users["cuda"]) == ("10001:10001", "10001:10001")


def test_the_base_is_pinned_and_the_same_for_all_stages(root: Path) -> None:
    found = instructions(root)
    (tag,) = [
        arguments.removeprefix("PYTHON=") for name, arguments in found if name == "ARG" and "PYTHON=" in arguments
    ]
    assert re.fullmatch(r"\d+\.\d+\.\d+-slim-bookworm", tag)
    stages = {arguments.partition(" AS ")[2] for name, arguments in found if name == "FROM"}
    for name, arguments in found:
        if name == "FROM":
            base = arguments.partition(" AS ")[0]
            assert base in stages or base == "python:${PYTHON}"


def test_the_image_sets_no_option_that_would_go_before_a_file(root: Path) -> None:
    """The chart hands the server a file; a variable of the image would win over it."""
    for name, arguments in instructions(root):
        if name == "ENV":
            assert "LIGHTQWEN_" not in arguments


def test_the_images_file_of_options_is_one_that_the_server_takes(root: Path) -> None:
    config = load_config(["--config", str(root / "deploy" / "server.toml")])
    assert (config.host, config.metrics_host, config.health_host) == ("0.0.0.0", "0.0.0.0", "0.0.0.0")
    (exposed,) = [arguments.split() for name, arguments in instructions(root) if name == "EXPOSE"]
    assert [int(port) for port in exposed] == [config.port, config.health_port, config.metrics_port]


@pytest.fixture(scope="module")
def context(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine would be sent: the files that .dockerignore lets through."""
    lines = [line.strip() for line in (root / ".dockerignore").read_text().splitlines()]
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    folder = tmp_path_factory.mktemp("context")
    for rule in rules:
        if rule.startswith("!"):
            source, target = root / rule[1:], folder / rule[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            else:
                shutil.copy(source, target)
    assert rules[-2:] == ["**/__pycache__", "**/*.pyc"]
    return folder


def test_everything_that_is_copied_is_in_the_context_and_nothing_else(root: Path, context: Path) -> None:
    copied = set()
    for name, arguments in instructions(root):
        if name == "COPY" and "--from=" not in arguments:
            copied |= set(arguments.split()[:-1])
    for path in copied:
        assert (context / path).exists(), path
    for path in context.rglob("*"):
        relative = path.relative_to(context)
        if path.is_file():
            assert any(relative.is_relative_to(name) for name in copied), relative


def test_the_context_is_enough_to_build_the_server(context: Path, tmp_path: Path) -> None:
    """What the Dockerfile's `pip install .` does, without the packages that it fetches."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", tmp_path, context], capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"service/cli.py", "worker/rank.py", "model/qwen3.py", "lightqwen/client.py"} <= names
    assert "model/demo/model.safetensors" in names


def test_kernels_are_compiled_for_shapes_that_there_are(root: Path) -> None:
    given = [text.partition("=")[::2] for name, text in instructions(root) if name == "ARG"]
    kernels = dict(given)["KERNELS"].strip('"').split()
    assert {shape for shape in kernels if "/" not in shape} == set(SIZES)
    for shape in kernels:
        split_share(shape)


def test_every_direct_dependency_is_pinned_within_its_bounds(root: Path) -> None:
    lines = (root / "deploy" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["server"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "torch":  # its version is an argument of the build
            assert name in pins, f"deploy/constraints.txt has no {name}"
            assert requirement.specifier.contains(pins[name]), text


# ---- docker-compose.yml ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/docker-compose.gpu.yml"])
def test_compose_files_are_valid(root: Path, name: str) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", root / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_that_is_mounted_exists(root: Path, compose: dict[str, Any]) -> None:
    assert mounts(compose, "prometheus")
    assert mounts(compose, "grafana")
    for service in compose["services"]:
        for source in mounts(compose, service).values():
            assert (root / source).exists(), source
    used = {v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", []) if v[0] not in "./"}
    assert used == set(compose["volumes"])


def test_ports_are_published_on_this_machine_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")


def test_images_have_tags(root: Path, compose: dict[str, Any]) -> None:
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    gpu = yaml.safe_load((root / "deploy" / "docker-compose.gpu.yml").read_text())
    assert compose["services"]["server"]["image"] == f"lightqwen:{version}-cpu"
    assert gpu["services"]["server"]["image"] == f"lightqwen:{version}-cuda"
    for service in compose["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"])
    targets = {arguments.partition(" AS ")[2] for name, arguments in instructions(root) if name == "FROM"}
    assert {compose["services"]["server"]["build"]["target"], gpu["services"]["server"]["build"]["target"]} <= targets


def test_the_server_gets_the_time_to_drain(root: Path, compose: dict[str, Any]) -> None:
    config = load_config(["--config", str(root / "deploy" / "server.toml")])
    grace = float(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > config.withdrawal_s + config.drain_timeout_s + 5


def test_prometheus_takes_its_configuration(
    root: Path, compose: dict[str, Any], promtool: Promtool, tmp_path: Path
) -> None:
    mounted = mounts(compose, "prometheus")
    config = yaml.safe_load((root / mounted["/etc/prometheus/prometheus.yml"]).read_text())
    folder = str(root / mounted["/etc/prometheus/rules"])
    rules = [path.replace("/etc/prometheus/rules", folder) for path in config["rule_files"]]
    assert [os.path.basename(path) for path in rules] == ["recording.yaml", "alerts.yaml"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({**config, "rule_files": rules}))
    done = promtool("check", "config", "--lint-fatal", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


def test_prometheus_scrapes_the_server_and_labels_it_as_the_rules_want(root: Path, compose: dict[str, Any]) -> None:
    (job,) = yaml.safe_load((root / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "lightqwen"
    ((target,), labels) = job["static_configs"][0]["targets"], job["static_configs"][0]["labels"]
    host, port = target.split(":")
    assert host in compose["services"]
    assert int(port) == load_config(["--config", str(root / "deploy" / "server.toml")]).metrics_port
    assert set(labels) == {"release", "namespace", "pod"}


def test_grafana_is_provisioned_with_prometheus_and_the_dashboards(root: Path, compose: dict[str, Any]) -> None:
    mounted = mounts(compose, "grafana")
    folder = root / mounted["/etc/grafana/provisioning/datasources"]
    (source,) = [s for path in folder.glob("*.yaml") for s in yaml.safe_load(path.read_text())["datasources"]]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    assert any(port.endswith(":9090") for port in compose["services"]["prometheus"]["ports"])
    interval = yaml.safe_load((root / "deploy" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval

    folder = root / mounted["/etc/grafana/provisioning/dashboards"]
    (provider,) = [p for path in folder.glob("*.yaml") for p in yaml.safe_load(path.read_text())["providers"]]
    assert root / mounted[provider["options"]["path"]] == root / "helm" / "lightqwen" / "dashboards"
    home = Path(compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert home.stem in load_dashboards()
