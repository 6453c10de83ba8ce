"""What a scanner that is not ours says of the rendered objects and of the Dockerfile."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helm.chart import NAMESPACE, ROOT, SCENARIOS, TOOLS, Object, oldest_for, render

CHECKOV = TOOLS / "checkov" / "bin" / "checkov"
MISSING = TOOLS / "checkov-missing"

SERVER = "Deployment/qwen-lightqwen|Pod/qwen-lightqwen-nodes-(leader|worker)"
TEST = "Pod/qwen-lightqwen-test-generate"

# Every check that is not obeyed: of which objects, and why. All others must pass.
SUPPRESSED = {
    "CKV_K8S_11": (f"{SERVER}|{TEST}", "CPU limits: throttling the leader stalls every GPU; requests are there"),
    "CKV_K8S_8": (TEST, "liveness probe: it makes one call and ends, by activeDeadlineSeconds at the latest"),
    "CKV_K8S_9": (TEST, "readiness probe: nobody calls it"),
    "CKV2_K8S_6": (TEST, "NetworkPolicy: it listens nowhere, and what it may call the server's policy says"),
}

# As an installation should name its image; the examples cannot, for none is published.
DIGEST = {"image.digest": "sha256:" + "0" * 64}


def as_seen(item: Object) -> list[Object]:
    """As the API server would have it: in a namespace, and a group's pods as pods, which the scanner knows."""
    item = copy.deepcopy(item)
    item["metadata"]["namespace"] = NAMESPACE
    if item["kind"] != "LeaderWorkerSet":
        return [item]
    group = item["spec"]["leaderWorkerTemplate"]
    pods = []
    for role in ("leader", "worker"):
        pod = copy.deepcopy(group[f"{role}Template"])
        pod["metadata"] |= {"name": f"{item['metadata']['name']}-{role}", "namespace": NAMESPACE}
        pods.append({"apiVersion": "v1", "kind": "Pod", **pod})
    return pods


def broken(items: list[Object]) -> Object:
    """One that nobody should run."""
    pod = copy.deepcopy(next(item for item in items if item["kind"] == "Pod"))
    pod["metadata"]["name"] = "broken"
    pod["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    return pod


@pytest.mark.timeout(120)
def test_whatever_checkov_finds_has_its_reason_here(tmp_path: Path) -> None:
    """One test, for it is one run; the last object is one of which it must complain."""
    if not CHECKOV.exists() or MISSING.exists():
        reason = MISSING.read_text().strip() if MISSING.exists() else "it is not installed (make test-helm does that)"
        pytest.skip(f"checkov: {reason}")
    items: list[Object] = []
    for name, path in SCENARIOS.items():
        rendered = render(path, values=DIGEST, version=oldest_for(name))
        items = [seen for item in rendered for seen in as_seen(item)]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(items))
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken(items)))
    shutil.copy(ROOT / "Dockerfile", tmp_path)

    findings = scan(tmp_path)
    of_broken = {finding["check_id"] for finding in findings if finding["file_path"] == "/broken.yaml"}
    privileged, read_only_root = "CKV_K8S_16", "CKV_K8S_22"
    assert {privileged, read_only_root} <= of_broken
    of_ours = [finding for finding in findings if finding["file_path"] != "/broken.yaml"]
    assert [str(finding) for finding in of_ours if not is_suppressed(finding)] == []
    assert set(SUPPRESSED) <= {finding["check_id"] for finding in of_ours}, "a reason for what is not found any more"


def scan(folder: Path) -> list[dict[str, str]]:
    """Every check that failed: its id and name, the file, the object."""
    command = [CHECKOV, "--skip-download", "--quiet", "--compact", "--soft-fail", "--output", "json"]
    command += ["--framework", "kubernetes", "dockerfile", "--directory", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    reports = json.loads(done.stdout)
    assert {report["check_type"] for report in reports} == {"kubernetes", "dockerfile"}
    for report in reports:
        assert report["summary"]["parsing_errors"] == 0
        assert report["summary"]["passed"] > 100
    told = ("check_id", "check_name", "file_path", "resource")
    return [{key: failed[key] for key in told} for report in reports for failed in report["results"]["failed_checks"]]


def is_suppressed(finding: dict[str, str]) -> bool:
    if finding["check_id"] not in SUPPRESSED:
        return False
    objects, _ = SUPPRESSED[finding["check_id"]]
    return re.fullmatch(objects, finding["resource"].replace(f".{NAMESPACE}.", "/")) is not None
