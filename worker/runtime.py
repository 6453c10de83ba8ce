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

_CAPTURED_TOKENS = (64, *range(128, 1025, 128), 1536, 2048, 3072, 4096, 6144, 8192)
_CAPTURED_FLOPS_PER_LAYER = 5.6e11
"""Steps of so many tokens have graphs, unless a layer takes more operations: then it keeps the device busy (at 620
TFLOP/s for 0.9 ms) for longer than any host takes to launch it, and padding steps would be a waste. A layer of 12
launches takes a host 0.2 to 0.7 ms, the longer with several ranks (measured: 64 layers of 32B on two H200s 48 ms)."""

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
        return self.device.type == "cuda"


def resolve(config: EngineConfig, checkpoint: Qwen3Config, rank: int) -> RuntimeConfig:
    """Decide every default for this rank.

    Raises:
        ConfigError, ModelError: the machine or the checkpoint cannot do what was asked for.
    """
    device = _device(config, rank)
    on_gpu = device.type == "cuda"
    max_running = config.max_running or (256 if on_gpu else 64)
    max_batched_tokens = config.max_batched_tokens or max(8192 if on_gpu else 1024, max_running)
    if max_batched_tokens < max_running:
        raise ConfigError(
            f"max_batched_tokens={max_batched_tokens} is below max_running={max_running}: "
            "a step must have room for one token of every running request"
        )
    captured = captured_tokens(checkpoint, config.tensor_parallel_size, max_batched_tokens)
    return RuntimeConfig(
        device=device,
        dtype=_dtype(config, checkpoint, on_gpu),
        attention_backend=resolve_backend(config.attention_backend, device),
        max_model_len=_max_model_len(config, checkpoint),
        max_running=max_running,
        max_batched_tokens=max_batched_tokens,
        max_mixed_tokens=max_mixed_tokens(config, max_batched_tokens, max_running, captured if on_gpu else None),
        captured_tokens=captured,
        block_size=config.block_size,
        cuda_graphs=config.cuda_graphs and on_gpu,
        run_ahead=config.run_ahead or (2 if on_gpu else 1),
        hang_timeout_s=config.hang_timeout_s or (60.0 if on_gpu else 600.0),
    )


def captured_tokens(checkpoint: Qwen3Config, ranks: int, max_batched_tokens: int) -> tuple[int, ...]:
    """Return the numbers of tokens that steps of any kind are padded to, where there are graphs."""
    flops_per_token = 2 * checkpoint.layer_parameters / ranks  # of the layers; attention and head are left out
    most = min(checkpoint.num_hidden_layers * _CAPTURED_FLOPS_PER_LAYER / flops_per_token, max_batched_tokens)
    return tuple(tokens for tokens in _CAPTURED_TOKENS if tokens <= most)


def max_mixed_tokens(
    config: EngineConfig, max_batched_tokens: int, max_running: int, captured: tuple[int, ...] | None
) -> int:
    """Return how many tokens a step may compute in which requests decode; None stands for a device without graphs.

    Raises:
        ConfigError: what was asked for does not lie between `max_running` and `max_batched_tokens`.
    """
    if config.max_mixed_tokens is None:
        wanted = max_batched_tokens if captured is None else max(captured, default=0)
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
