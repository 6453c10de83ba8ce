"""What is shipped: a wheel with every package and the demo checkpoint, and a base installation that can talk."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of the files that belong to the project, built from a copy: builds leave files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "service", "worker", "model", "protos", "bench"):
        (source / name).symlink_to(root / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", folder, source], capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_every_module(wheel: zipfile.ZipFile, root: Path) -> None:
    shipped = set(wheel.namelist())
    for package in ("service", "worker", "model", "bench"):
        for path in (root / package).rglob("*.py"):
            assert str(path.relative_to(root)) in shipped
    for path in (root / "protos" / "lightqwen").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(root / "protos")) in shipped


def test_wheel_has_the_demo_checkpoint(wheel: zipfile.ZipFile, demo_checkpoint: Path) -> None:
    files = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    for name in files:
        assert wheel.read(f"model/demo/{name}") == (demo_checkpoint / name).read_bytes()


def test_wheel_has_the_table_that_a_benchmark_writes(wheel: zipfile.ZipFile, root: Path) -> None:
    table = "model/kernels/algorithms.json"
    assert wheel.read(table) == (root / table).read_bytes()


def test_wheel_has_the_kernels_that_are_compiled_from_files(wheel: zipfile.ZipFile, root: Path) -> None:
    files = sorted(path.relative_to(root).as_posix() for path in (root / "model/kernels").glob("*.cu*"))
    assert files == [f"model/kernels/{name}" for name in ("cluster_linear.cu", "gated_linear.cu", "hopper.cuh")]
    for file in files:
        assert wheel.read(file) == (root / file).read_bytes()


def test_wheel_has_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} <= {
        "service",
        "worker",
        "model",
        "lightqwen",
        "bench",
    }


def test_wheel_needs_only_grpcio_and_protobuf(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    needed = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist:")]
    base = [re.split(r"[<>=, ]", line.removeprefix("Requires-Dist: "))[0] for line in needed if "extra ==" not in line]
    assert sorted(base) == ["grpcio", "protobuf"]


BASE_ONLY = """
import importlib.abc, sys
ALLOWED = {"grpc", "google", "typing_extensions", "lightqwen", "service", "bench"}

class Gate(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ALLOWED:
            raise ModuleNotFoundError(f"not in the base installation: {name}", name=name)

sys.meta_path.insert(0, Gate())
"""


@pytest.mark.parametrize("module", ["lightqwen.client", "service.cli", "service.talk"])
def test_base_installation_imports(module: str) -> None:
    code = f"{BASE_ONLY}\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_serve_on_the_base_installation_says_what_is_missing() -> None:
    code = f"{BASE_ONLY}\nsys.argv = ['lightqwen', 'serve']\nfrom service.cli import main\nsys.exit(main())"
    code = code.replace('"bench"}', '"bench", "worker"}')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "lightqwen: error: pydantic is not installed; a server needs: pip install 'lightqwen[server]'"
    ]


def test_bench_on_the_base_installation_says_what_is_missing() -> None:
    code = f"{BASE_ONLY}\nsys.argv = ['lightqwen', 'bench']\nfrom service.cli import main\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "lightqwen: error: numpy is not installed; bench needs: pip install 'lightqwen[bench]'"
    ]


def test_installed_command_is_ours(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lightqwen": "service.cli:main"}
    script = Path(sys.executable).parent / "lightqwen"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=30)
    assert done.stdout == f"lightqwen {project['version']}\n"


def test_no_file_names_a_registry_host(root: Path) -> None:
    """Where packages come from is the machine's business (pip's and npm's own configuration)."""
    for name in ("Makefile", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml"):
        text = (root / name).read_text()
        assert "://" not in text, name
        assert "index-url" not in text, name
