"""Every option of the server as one frozen object, and how it is read: flags, environment, file, defaults.

`ServeConfig` adds the gateway's options to the engine's. A field is at once the flag `--max-queued-requests`, the
environment variable `LIGHTQWEN_MAX_QUEUED_REQUESTS` and the key `max_queued_requests` of the TOML file.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from worker.config import ConfigError, EngineConfig, problems

ENV_PREFIX = "LIGHTQWEN_"


class ServeConfig(BaseSettings, EngineConfig):
    """Serve a Qwen3 checkpoint over gRPC. Options may also be LIGHTQWEN_... variables, or keys of --config's file."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, env_prefix=ENV_PREFIX, env_ignore_empty=True
    )

    config: Path | None = None
    """TOML file with these options as keys (max_queued_requests = 64). Flags and environment go before it."""
    host: str = "127.0.0.1"
    """Address to listen on for gRPC. 0.0.0.0 or [::] opens it to the network."""
    port: int = Field(50051, ge=0, le=65535)
    """Port for gRPC. 0: any free one; the ready line tells which."""
    gateways: int = Field(1, ge=1, le=64)
    """Processes that serve gRPC on the port (several: on Linux). Each takes its part of the connections and limits."""
    metrics_host: str = "127.0.0.1"
    """Address to listen on for /metrics and /healthz."""
    metrics_port: int = Field(9464, ge=-1, le=65535)
    """HTTP port for /metrics and /healthz. 0: any free one; -1: none."""
    health_host: str = "127.0.0.1"
    """Address to listen on for probes."""
    health_port: int = Field(-1, ge=-1, le=65535)
    """Port for plaintext grpc.health.v1 that no load delays, for probes. 0: any free one; -1: none."""
    tls_cert: Path | None = None
    """Certificate chain of the gRPC port (PEM), with --tls-key. Read again when it changes. Default: plain text."""
    tls_key: Path | None = None
    """Key of --tls-cert (PEM, without a passphrase)."""
    tls_client_ca: Path | None = None
    """Certificates (PEM) of which one must have signed a client's: mutual TLS. Read again when it changes."""
    auth_tokens_file: Path | None = None
    """File with one name:token a line; every call needs one of these bearer tokens. Read again when it changes."""
    admin_tokens_file: Path | None = None
    """The same for AdminService, which then takes only these; the other services take them too."""
    served_model_name: str | None = Field(None, min_length=1, max_length=256)
    """The model's name in requests, answers and metrics. Default: the name of the checkpoint's folder."""
    max_queued_requests: int = Field(1024, ge=1)
    """Requests that wait for their first step at most; more are refused with RESOURCE_EXHAUSTED."""
    max_queued_tokens: int = Field(1_048_576, ge=1)
    """Prompt tokens that wait for their first step at most. A longer prompt is still taken when nothing else waits."""
    max_streams: int = Field(4096, ge=1)
    """Generate calls open at the same time at most, running ones included."""
    max_prompt_bytes: int = Field(4 * 2**20, ge=1, le=2**30)
    """Bytes of a prompt at most: of text or chats in UTF-8, of token ids four each."""
    max_chat_messages: int = Field(1024, ge=1)
    """Messages of a chat prompt at most, and as many tools and tool calls."""
    max_stop_strings: int = Field(16, ge=0, le=64)
    """Stop strings of one request at most."""
    max_stop_string_bytes: int = Field(256, ge=1, le=4096)
    """Bytes of one stop string at most (UTF-8)."""
    max_receive_message_bytes: int = Field(16 * 2**20, ge=4096, le=2**30)
    """Size of one request message at most."""
    tokenizer_threads: int = Field(2, ge=1, le=64)
    """Threads that render chats and tokenize."""
    drain_timeout_s: float = Field(30.0, ge=0.0)
    """After SIGTERM and the withdrawal: how long running requests may go on."""
    withdrawal_s: float = Field(0.0, ge=0.0)
    """After SIGTERM: how long new requests are still taken while health is NOT_SERVING, for balancers to notice."""
    reflection: bool = True
    """Let gRPC clients ask for the contract (server reflection)."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged, on stderr."""
    log_format: Literal["text", "json"] = "text"
    """One line of text, or one JSON object, for each record."""

    @model_validator(mode="after")
    def _gateways_can_share(self) -> Self:
        if self.gateways > 1 and sys.platform != "linux":
            raise ValueError("--gateways: several can share a port on Linux only")
        for option in ("max_queued_requests", "max_queued_tokens", "max_streams"):
            if getattr(self, option) < self.gateways:
                flag = "--" + option.replace("_", "-")
                raise ValueError(f"{flag}: each of --gateways {self.gateways} needs a part of it")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise ValueError(f"{given}: needs {missing}")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca: needs --tls-cert and --tls-key")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ConfigFile(settings_cls), _Launcher(settings_cls)


class _ConfigFile(InitSettingsSource):
    """The TOML file that a source before this one named as `config`."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, init_kwargs={})

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            return tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config: {path} is not TOML: {error}") from error


class _Launcher(InitSettingsSource):
    """What those who start one process on each of several nodes tell them: LeaderWorkerSet, else torchrun and its kin.

    Only options that nothing else has given are taken; `nodes = 1` declines all of it.
    """

    NAMES: ClassVar[tuple[dict[str, tuple[str, ...]], ...]] = (
        {
            "nodes": ("LWS_GROUP_SIZE",),
            "node_rank": ("LWS_WORKER_INDEX",),
            "leader_address": ("LWS_LEADER_ADDRESS",),
        },
        {
            "nodes": ("GROUP_WORLD_SIZE", "PET_NNODES", "NNODES"),
            "node_rank": ("GROUP_RANK", "PET_NODE_RANK", "NODE_RANK"),
            "leader_address": ("MASTER_ADDR",),
            "leader_port": ("MASTER_PORT",),
        },
    )

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, init_kwargs={})

    def __call__(self) -> dict[str, Any]:
        given = self.current_state.get("nodes")
        for names in self.NAMES:
            found = {option: self._first(variables) for option, variables in names.items()}
            found = {option: value for option, value in found.items() if value}
            nodes = str(found.get("nodes", "1") if given is None else given)
            if found and nodes != "1":
                return found
        return {}

    @staticmethod
    def _first(variables: tuple[str, ...]) -> str | None:
        return next((os.environ[name] for name in variables if os.environ.get(name)), None)


def load_config(argv: list[str], prog: str = "lightqwen serve") -> ServeConfig:
    """Read the configuration from flags, environment and file.

    Raises:
        ConfigError: with one line for each problem.
        SystemExit: after `--help` was printed.
    """
    flags: CliSettingsSource[Any] = CliSettingsSource(
        ServeConfig,
        cli_prog_name=prog,
        cli_parse_args=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )
    try:
        return ServeConfig(_cli_settings_source=flags(args=argv))
    except SettingsError as error:
        raise ConfigError(str(error).removeprefix("error parsing CLI: ")) from error
    except ValidationError as error:
        raise ConfigError(problems(error)) from error
