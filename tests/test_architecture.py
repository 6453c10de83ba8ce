"""The rules of docs/architecture.md that a machine can check: who imports whom, and what is never used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("service", "worker", "model", "protos", "bench")


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"))


def test_import_contracts(root: Path) -> None:
    """The contracts themselves stand in pyproject.toml."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr


def test_service_runs_without_torch(root: Path) -> None:
    """Import every module of the gateway and of what it sees of the worker; nothing heavy may come along."""
    modules = [f"service.{path.stem}" for path in sorted((root / "service").glob("*.py")) if path.stem != "__init__"]
    seen = ("messages", "config", "client", "control", "endpoint", "supervisor", "vitals")
    modules += [f"worker.{name}" for name in seen]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    heavy = {{"torch", "triton", "transformers", "model"}} & set(sys.modules)
    assert not heavy, f"{{name}} brings {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


def test_a_rank_starts_without_what_torch_imports_late(root: Path) -> None:
    """Where PyTorch computes in Python, as with tensors on `meta`, it imports sympy, which takes half a second."""
    code = """
import sys
import torch
late = {"sympy", "torch._dynamo", "torch._inductor"} - set(sys.modules)
from model.config import Qwen3Config
from model.parallel import TensorParallel
from worker.config import EngineConfig
from worker.runner import build_runner
from worker.runtime import resolve
config = EngineConfig(model="model/demo", device="cpu", num_blocks=4, max_model_len=64)
shape = Qwen3Config.from_folder(config.model)
build_runner(config, shape, resolve(config, shape, 0), TensorParallel.single(), lambda what, done, total: None)
assert not late & set(sys.modules), late & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


def test_no_module_level_mutable_state(root: Path) -> None:
    """No `global`, and no empty container at module level, which could only be there to be filled later."""
    found = []
    for path, tree in sources(root):
        found += [f"{path}:{node.lineno} global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
        for statement in tree.body:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Assign | ast.AnnAssign) and _is_empty_container(value):
                found.append(f"{path}:{statement.lineno} empty container at module level")
    assert not found, found


def _is_empty_container(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("dict", "list", "set", "deque", "defaultdict") and not node.args
    return (isinstance(node, ast.List) and not node.elts) or (isinstance(node, ast.Dict) and not node.keys)


@pytest.mark.parametrize("module", ["pickle", "marshal", "shelve", "dill", "cloudpickle"])
def test_nothing_unpickles(root: Path, module: str) -> None:
    found = []
    for path, tree in sources(root):
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if module in (name.split(".")[0] for name in names):
                found.append(f"{path}:{node.lineno}")
    assert not found, found


def test_no_connection_sends_objects(root: Path) -> None:
    """`Connection.send` and `recv` pickle; on our pipes only bytes go."""
    found = []
    for path, tree in sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("send_pyobj", "recv_pyobj", "Queue", "Manager"):
                base = node.value.id if isinstance(node.value, ast.Name) else ""
                if node.attr.endswith("pyobj") or base in ("multiprocessing", "mp"):
                    found.append(f"{path}:{node.lineno} {node.attr}")
    assert not found, found


def test_every_module_says_why_it_exists(root: Path) -> None:
    silent = [str(path) for path, tree in sources(root) if not ast.get_docstring(tree)]
    assert not silent, silent
