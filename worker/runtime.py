"""What a rank finally runs with: the one place that turns what was asked for into what will be done.

Everything that depends on the device or the checkpoint is decided here, once, before anything large is allocated; only
the number of KV blocks is measured later (`worker/runner.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.attention import resolve_backend
from model.config import Qwen3Config
from worker.config import ConfigError, EngineConfig

_CAPTURED_TOKENS = (64, *range(128, 1025, 128), *range(1280, 2049, 256), 3072, 4096, 6144, 8192)
"""Steps of any kind are padded to so many tokens, if they have a graph."""

_MIXED_FLOPS = 4e13
"""Of a step in which requests decode: at 650 TFLOP/s 60 ms, for which they wait. Longer ones have no graph: each of at
most 64 layers keeps the device busy for longer than most hosts take to launch it, 0.2 to 0.8 ms for 12 launches, so
that padding would be a waste."""

_WHOLE_TURNS = 33 * 256
"""Tokens of a step at most where steps of 8,192 have no graph. So many tiles of 256 rows, times a number of tiles of
features that 4 divides, as all of 8B's products have, are whole turns of a Hopper's 132 multiprocessors. 8,192 tokens
take as many, with some multiprocessors idle in the last one; in gate and up, nearly all (docs/performance.md)."""

_LEAST_MIXED_TOKENS = 1024
"""Of large models too, of which prompts would else have but the place that `max_running` decodes leave them. A step of
as many takes any model some ten times as long as a step of few decodes, whose time grows with the weights as well."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    device: torch.device
    dtype: torch.dtype
    attention_backend: str
    max_model_len: int
    max_running: int
    max_batched_tokens: int
    max_mixed_tokens: int
    captured_tokens: tuple[int, ...]  # steps of any kind are padded to so many, if a graph is worth it
    block_size: int
    cuda_graphs: bool
    run_ahead: int
    hang_timeout_s: float

    @property
    def on_gpu(self) -> bool:
        """Or on one that is still to be."""
        return self.device.type != "cpu"


def resolve(
    config: EngineConfig, checkpoint: Qwen3Config, rank: int, device: torch.device | None = None
) -> RuntimeConfig:
    """Decide every default for this rank, on the device that is there for it or on another one.

    Raises:
        ConfigError, ModelError: the machine or the checkpoint cannot do what was asked for.
    """
    device = device or _device(config, rank)
    on_gpu = device.type != "cpu"
    max_running = config.max_running or (256 if on_gpu else 64)
    flops_per_token = 2 * checkpoint.layer_parameters / config.tensor_parallel_size  # attention and head left out
    most = _default_batched_tokens(flops_per_token) if on_gpu else 1024
    batched = config.max_batched_tokens or max(most, max_running)
    if batched < max_running:
        raise ConfigError(
            f"max_batched_tokens={batched} is below max_running={max_running}: "
            "a step must have room for one token of every running request"
        )
    captured = captured_tokens(flops_per_token)
    return RuntimeConfig(
        device=device,
        dtype=_dtype(config, checkpoint, on_gpu),
        attention_backend=resolve_backend(config.attention_backend, device),
        max_model_len=_max_model_len(config, checkpoint),
        max_running=max_running,
        max_batched_tokens=batched,
        max_mixed_tokens=max_mixed_tokens(config, batched, max_running, flops_per_token, on_gpu=on_gpu),
        captured_tokens=tuple(tokens for tokens in captured if tokens <= batched),
        block_size=config.block_size,
        cuda_graphs=config.cuda_graphs and on_gpu,
        run_ahead=config.run_ahead or (2 if on_gpu else 1),
        hang_timeout_s=config.hang_timeout_s or (60.0 if on_gpu else 600.0),
    )


def _default_batched_tokens(flops_per_token: float) -> int:
    """Return how many tokens a step of a GPU may compute if nobody says."""
    longest = _CAPTURED_TOKENS[-1]
    return longest if longest in captured_tokens(flops_per_token) else _WHOLE_TURNS


def captured_tokens(flops_per_token: float) -> tuple[int, ...]:
    """Return the numbers of tokens that steps of any kind are padded to, where there are graphs: those of no longer
    steps than one in which requests decode may be."""
    return tuple(tokens for tokens in _CAPTURED_TOKENS if tokens * flops_per_token <= _MIXED_FLOPS)


def max_mixed_tokens(
    config: EngineConfig, max_batched_tokens: int, max_running: int, flops_per_token: float, *, on_gpu: bool
) -> int:
    """Return how many tokens a step may compute in which requests decode.

    Raises:
        ConfigError: what was asked for does not lie between `max_running` and `max_batched_tokens`.
    """
    if config.max_mixed_tokens is None:
        wanted = max(captured_tokens(flops_per_token), default=0) if on_gpu else max_batched_tokens
        return min(max(wanted, _LEAST_MIXED_TOKENS, max_running), max_batched_tokens)
    if not max_running <= config.max_mixed_tokens <= max_batched_tokens:
        raise ConfigError(
            f"max_mixed_tokens={config.max_mixed_tokens} must be at least max_running={max_running}, so that every "
            f"running request can decode, and at most max_batched_tokens={max_batched_tokens}"
        )
    return config.max_mixed_tokens


def _device(config: EngineConfig, rank: int) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or (config.device == "auto" and found == 0):
        return torch.device("cpu")
    if found < config.local_size:
        where = f" on each of {config.nodes} nodes" if config.nodes > 1 else ""
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs {config.local_size} CUDA GPUs{where}, "
            f"{found} found by PyTorch {torch.__version__}; {'lower it, ' if found else ''}make more GPUs visible "
            "(CUDA_VISIBLE_DEVICES), or use device=cpu"
        )
    return torch.device("cuda", rank - config.local_ranks.start)


def _dtype(config: EngineConfig, checkpoint: Qwen3Config, on_gpu: bool) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return _DTYPES[checkpoint.dtype] if on_gpu else torch.float32


def _max_model_len(config: EngineConfig, checkpoint: Qwen3Config) -> int:
    longest = checkpoint.max_context
    wanted = config.max_model_len or longest
    if wanted > longest:
        raise ConfigError(
            f"max_model_len={wanted} is beyond the checkpoint's {longest} positions; lower it, or give the "
            "checkpoint's config.json a rope scaling (yarn) that reaches so far"
        )
    return wanted
