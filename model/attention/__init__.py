"""Attention over the paged KV cache: one interface, several backends, one place that chooses.

`torch` is the reference and runs on the CPU. `triton` is the default on CUDA. `flash` uses the flash-attn packages
where they are installed. Backends are imported only when chosen, so that none of them is a dependency of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, cast, get_args

import torch

from model.errors import ModelError
from model.inputs import StepInputs
from model.kernels.rope_kv import Projected

BackendName = Literal["torch", "triton", "flash"]
CapturedSteps = Literal["none", "decode", "all"]


class AttentionBackend(Protocol):
    """Causal grouped-query attention. Stateless between calls as far as a caller can see; one serves every layer."""

    @property
    def graphs(self) -> CapturedSteps:
        """Which steps may be captured in a CUDA graph: those of decode rows alone, or all, or none."""
        ...

    def plan(self, inputs: StepInputs) -> Any:
        """Return what every layer's `forward` needs to know of a step; it becomes `inputs.attention_plan`."""
        ...

    def forward(
        self,
        q: torch.Tensor,  # [tokens, heads, head_dim]
        key_cache: torch.Tensor,  # [num_blocks, block_size, kv_heads, head_dim]
        value_cache: torch.Tensor,  # same
        inputs: StepInputs,
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]: what each query reads from its row's keys; anything for dead rows."""
        ...

    def decode(
        self, projected: Projected, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor | None:
        """Do `projected.store` and `forward` in one where that is faster; None: it has done nothing."""
        ...


def resolve_backend(name: str, device: torch.device) -> BackendName:
    """Settle which backend runs on `device`; `auto` is triton on CUDA and torch on the CPU.

    Raises:
        ModelError: `name` is unknown, or cannot run on `device`.
    """
    if name == "auto":
        return "torch" if device.type == "cpu" else "triton"
    if name not in get_args(BackendName):
        raise ModelError(f"unknown attention backend {name!r}; there are auto, {', '.join(get_args(BackendName))}")
    if name != "torch" and device.type == "cpu":
        raise ModelError(f"attention backend {name} needs a GPU, but the device is {device}; use torch")
    return cast(BackendName, name)


def make_attention(
    name: str,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionBackend:
    """Build the backend called `name` for one rank.

    Args:
        num_heads, num_kv_heads: of this rank.
        scale: multiplies the scores, head_dim ** -0.5 for Qwen3.
        block_size: tokens of one KV block.

    Raises:
        ModelError: the backend is unknown, is not installed, or cannot run these shapes on `device`.
    """
    arguments = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "scale": scale,
        "block_size": block_size,
        "device": device,
        "dtype": dtype,
    }
    return _backend_class(resolve_backend(name, device))(**arguments)


def _backend_class(name: BackendName) -> Callable[..., AttentionBackend]:
    if name == "torch":
        from model.attention.torch_backend import TorchAttention

        return TorchAttention
    if name == "triton":
        from model.attention.triton_backend import TritonAttention

        return TritonAttention
    from model.attention.flash_backend import FlashAttention

    return FlashAttention
