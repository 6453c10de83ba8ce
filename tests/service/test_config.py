"""Flags, environment, file and defaults, in this order; and errors that a person can use."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import service.config
import worker.config
from service.config import ServeConfig, load_config
from worker.config import ConfigError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    launchers = ("LIGHTQWEN_", "LWS_", "MASTER_", "GROUP_", "PET_", "NNODES", "NODE_RANK")
    for name in list(os.environ):
        if name.startswith(launchers):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text('port = 1\nhost = "::1"\ntensor_parallel_size = 2\nprefix_caching = false\n')
    return path


def test_flags_go_before_environment_before_file_before_defaults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config([]).port == 50051
    from_file = load_config(["--config", str(file)])
    assert (from_file.port, from_file.host, from_file.prefix_caching) == (1, "::1", False)
    monkeypatch.setenv("LIGHTQWEN_PORT", "2")
    assert load_config(["--config", str(file)]).port == 2
    config = load_config(["--config", str(file), "--port", "3", "--prefix-caching"])
    assert (config.port, config.tensor_parallel_size, config.prefix_caching) == (3, 2, True)
    monkeypatch.setenv("LIGHTQWEN_CONFIG", str(file))
    assert load_config([]).tensor_parallel_size == 2


def test_an_option_of_the_engine_is_a_flag_too() -> None:
    config = load_config(["--tensor-parallel-size", "4", "--no-cuda-graphs", "--max-model-len", "100", "--model", "m"])
    assert (config.tensor_parallel_size, config.cuda_graphs, config.max_model_len, config.model) == (4, False, 100, "m")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--port", "70000"], ["--port: input should be less than or equal to 65535, got '70000'"]),
        (["--port", "x", "--block-size", "3"], ["--port: ", "--block-size: must be a power of two, got '3'"]),
        (["--dtype", "int3"], ["--dtype: input should be 'auto', 'bfloat16'"]),
        (["--bogus", "1"], ["unrecognized arguments: --bogus 1"]),
        (["--por", "1"], ["unrecognized arguments: --por 1"]),
        (["--tls-cert", "a"], ["--tls-cert: needs --tls-key"]),
        (["--tls-key", "a"], ["--tls-key: needs --tls-cert"]),
        (["--tls-client-ca", "a"], ["--tls-client-ca: needs --tls-cert and --tls-key"]),
        (["--gateways", "3", "--max-streams", "2"], ["--max-streams: each of --gateways 3 needs a part of it"]),
        (["--config", "/no/such/file"], ["--config: cannot read /no/such/file: No such file or directory"]),
        (["--drain-timeout-s", "inf"], ["--drain-timeout-s: input should be a finite number, got 'inf'"]),
    ],
)
def test_every_problem_is_one_readable_line(arguments: list[str], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    found = str(caught.value).splitlines()
    assert len(found) == len(lines)
    assert all(any(line.startswith(wanted) for line in found) for wanted in lines)


def test_several_gateways_need_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert load_config([]).gateways == 1
    with pytest.raises(ConfigError, match="--gateways: several can share a port on Linux only"):
        load_config(["--gateways", "2"])


@pytest.mark.parametrize(("text", "says"), [("prt = 1", "--prt: no such option"), ("port = = 1", "is not TOML")])
def test_a_wrong_file_is_a_readable_error(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(["--config", str(tmp_path / "c.toml")])


def test_help_names_every_option_and_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in ServeConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
        assert " ".join(field.description.split())[:40] in text


def test_every_option_has_a_docstring_of_its_own() -> None:
    for module in (service.config, worker.config):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for field, after in zip(node.body, node.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign):
                        assert isinstance(after, ast.Expr), ast.unparse(field)


LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "m-0.m.ns"}
TORCHRUN = {"GROUP_WORLD_SIZE": "4", "GROUP_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
OPERATOR = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        (LWS, [], (2, 1, "m-0.m.ns", 29500)),
        (TORCHRUN, [], (4, 3, "10.0.0.1", 29400)),
        (OPERATOR, [], (4, 3, "10.0.0.1", 29400)),
        (LWS | TORCHRUN, [], (2, 1, "m-0.m.ns", 29500)),
        (LWS, ["--leader-address", "here", "--leader-port", "7"], (2, 1, "here", 7)),
        (LWS | {"LIGHTQWEN_NODE_RANK": "0"}, [], (2, 0, "m-0.m.ns", 29500)),
        (TORCHRUN, ["--nodes", "2", "--node-rank", "1"], (2, 1, "10.0.0.1", 29400)),
        # Not several nodes, or not wanted:
        (LWS, ["--nodes", "1"], (1, 0, None, 29500)),
        (LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}, [], (1, 0, None, 29500)),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400", "NODE_RANK": "1"}, [], (1, 0, None, 29500)),
    ],
)
def test_what_starts_nodes_tells_them_by_the_environment(
    environment: dict[str, str],
    arguments: list[str],
    expected: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = load_config(["--tensor-parallel-size", "8", *arguments])
    assert (config.nodes, config.node_rank, config.leader_address, config.leader_port) == expected


def test_a_wrong_value_of_the_launcher_is_a_readable_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LWS | {"LWS_WORKER_INDEX": "x"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--node-rank: input should be a valid integer.*got 'x'"):
        load_config(["--tensor-parallel-size", "2"])


def test_it_is_frozen() -> None:
    config = ServeConfig(port=7)
    with pytest.raises(ValueError, match="frozen"):
        config.port = 8  # type: ignore[misc]
    assert config.model_copy(update={"model": "/m"}).model == "/m"
