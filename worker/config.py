"""What the engine can be told: each field is also a command-line option, an environment variable, a config-file key.

`EngineConfig` is what the user asked for. What a rank finally runs with (numbers that depend on the device, the
checkpoint and the free memory) is decided once, in `worker/runner.py`, and reported as `messages.EngineInfo`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails


class ConfigError(Exception):
    """The engine cannot run as configured. The message is one line that names the thing and the remedy."""


class EngineConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    model: str = ""
    """Folder of a Qwen3 checkpoint in Hugging Face format, or a hub id such as Qwen/Qwen3-0.6B. Empty: the demo's."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) when --model is a hub id."""
    load_format: Literal["auto", "random"] = "auto"
    """`auto` reads safetensors files; `random` makes weights from config.json alone (for benchmarks)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run. `auto`: CUDA where a GPU is present, else the CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights, activations and KV cache. `auto`: the checkpoint's on CUDA, float32 on the CPU."""
    tensor_parallel_size: int = Field(1, ge=1, le=64)
    """Number of ranks (GPUs) that share one model, on all nodes together."""
    nodes: int = Field(1, ge=1, le=64)
    """Machines that the ranks are spread over, the same number on each."""
    node_rank: int = Field(0, ge=0)
    """Which of the nodes this is. Node 0 leads and serves; the others only run ranks."""
    leader_address: str | None = Field(None, min_length=1)
    """Name or address of node 0, as the other nodes reach it (with --nodes)."""
    leader_port: int = Field(29500, ge=1, le=65535)
    """Port on which node 0 waits for the other nodes (with --nodes)."""
    join_timeout_s: float = Field(600.0, ge=1.0)
    """How long the nodes may take to find each other."""
    attention_backend: Literal["auto", "torch", "triton", "flash"] = "auto"
    """Attention implementation. `auto`: triton on CUDA, torch on the CPU. `flash` needs the extra of that name."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest sequence (prompt + output) in tokens. Default: the checkpoint's, cut to what the KV cache holds."""
    max_running: int | None = Field(None, ge=1, le=4096)
    """Requests computed at the same time (slots). Default: 256 on CUDA, 64 on the CPU."""
    max_batched_tokens: int | None = Field(None, ge=16)
    """Tokens of one step at most; longer prompts are prefilled in chunks. Default: 8192 on CUDA, 8448 of models of
    which 8192 take longer than 60 ms, 1024 on the CPU."""
    max_mixed_tokens: int | None = Field(None, ge=16)
    """The same for steps in which requests decode: their next token waits for the whole step. Default on CUDA: what a
    rank computes in some 60 ms of a Hopper GPU, and no fewer than 1024, within --max-batched-tokens; on the CPU:
    --max-batched-tokens."""
    block_size: int = Field(64, ge=1, le=1024)
    """Tokens of one KV block."""
    num_blocks: int | None = Field(None, ge=1)
    """KV blocks on each rank. Default: as many as --gpu-memory-utilization (or --cpu-kv-gib) allows."""
    gpu_memory_utilization: float = Field(0.9, gt=0.0, le=1.0)
    """Share of the GPU's memory for weights, activations and KV cache together."""
    cpu_kv_gib: float = Field(1.0, gt=0.0)
    """KV cache of one rank in GiB when running on the CPU."""
    prefix_caching: bool = True
    """Reuse KV blocks of equal prompt prefixes."""
    cuda_graphs: bool = True
    """Run steps as CUDA graphs, all but very large ones (CUDA only). Off helps debugging."""
    run_ahead: int | None = Field(None, ge=1, le=4)
    """Steps in flight before the oldest is read back. Default: 2 on CUDA, 1 on the CPU."""
    admission_watermark: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of the KV blocks kept free when a new request is admitted, so that running ones can grow."""
    max_restarts: int = Field(3, ge=0)
    """Times the ranks are started again within ten minutes after one died, before the server gives up."""
    hang_timeout_s: float | None = Field(None, ge=3.0)
    """A rank that makes no step for so long while it should counts as dead. Default: 60 on CUDA, 600 on the CPU."""

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        if self.node_rank >= self.nodes:
            raise ValueError(f"--node-rank: must be below --nodes {self.nodes}, got {self.node_rank}")
        if self.tensor_parallel_size % self.nodes:
            raise ValueError(
                f"--tensor-parallel-size: counts the ranks of all nodes and must divide by --nodes {self.nodes}, "
                f"got {self.tensor_parallel_size}"
            )
        if self.nodes > 1 and self.leader_address is None:
            raise ValueError(f"--leader-address: {self.nodes} nodes need it to find node 0")
        return self

    @property
    def local_size(self) -> int:
        """Ranks of each node."""
        return self.tensor_parallel_size // self.nodes

    @property
    def local_ranks(self) -> range:
        """Ranks of this node."""
        first = self.node_rank * self.local_size
        return range(first, first + self.local_size)


def engine_config(options: Mapping[str, object]) -> EngineConfig:
    """Read an engine's options, of which values may be text.

    Raises:
        ConfigError: with one line for each problem.
    """
    try:
        return EngineConfig.model_validate(options)
    except ValidationError as error:
        raise ConfigError(problems(error)) from error


def problems(error: ValidationError) -> str:
    """`--port: ...`, one line for each problem."""
    return "\n".join(_problem(details) for details in error.errors())


def _problem(details: ErrorDetails) -> str:
    message = details["msg"].removeprefix("Value error, ")
    if not details["loc"]:
        return message
    flag = "--" + str(details["loc"][0]).replace("_", "-")
    if details["type"] == "extra_forbidden":
        return f"{flag}: no such option"
    return f"{flag}: {message[:1].lower()}{message[1:]}, got {details['input']!r}"


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add `--set OPTION=VALUE ...`, which leaves pairs for `engine_config`."""
    parser.add_argument(
        "--set",
        type=_assignment,
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="options of the engine, which `lightqwen serve --help` explains: device=cpu max_running=64 ...",
    )


def _assignment(text: str) -> tuple[str, str]:
    option, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OPTION=VALUE")
    return option.removeprefix("--").replace("-", "_"), value
