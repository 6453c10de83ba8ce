"""Prefill by the flash-attn packages, an optional extra; decode stays on this project's Triton kernel.

What works with which block size on Hopper:

| package | versions | block size | |
| --- | --- | --- | --- |
| flash-attn-4 (`flash_attn.cute`) | 4.0.0b36 | any | fastest at 128, its tile, which it loads by TMA |
| flash-attn | 2.5 to 2.8.3 | multiples of 256 | about half of flash-attn-4's speed |
| flash-attn 3 (`hopper/`) | | | not supported: it is on no package index |

flash-attn-4 compiles each shape of head counts when it first meets it (2-3 s): warm it up before serving. It does not
split the KV length on Hopper, which is why decode is not its job here. Where it loads by TMA, it multiplies what lies
behind kv_len in a row's last block by zero instead of skipping it, so the cache must hold finite values only: allocate
it zeroed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch
import torch.nn.functional as F

from model.errors import ModelError
from model.inputs import StepInputs
from model.kernels.attention import AttentionPlan, paged_attention_triton, plan_attention
from model.kernels.rope_kv import Projected

_INSTALL = "pip install 'lightqwen[flash]', or use attention backend triton"


class FlashAttention:
    """Implements `AttentionBackend`; see there."""

    graphs: Final = "decode"  # the packages read lengths of the step on the host

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raises ModelError where no package is installed that can serve this GPU, dtype and block size."""
        if dtype not in (torch.bfloat16, torch.float16):
            raise ModelError(f"attention backend flash computes in bfloat16 or float16, not {dtype}; use triton")
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._scale = scale
        self._block_size = block_size
        self._dtype = dtype
        self._prefill = _find_prefill(block_size, device)

    def plan(self, inputs: StepInputs) -> AttentionPlan | None:
        """List the decode rows' units of work; prefill rows are the package's own business."""
        decodes = inputs.num_decode_rows
        if decodes == 0:
            return None
        return plan_attention(
            inputs.query_starts[: decodes + 1],
            inputs.kv_lens[:decodes],
            inputs.block_tables,
            block_size=self._block_size,
            num_tokens=decodes,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            dtype=self._dtype,
            max_chunk_rows=0,
        )

    def forward(
        self, q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]; zeros for dead rows. Tokens of no row are undefined."""
        decodes = inputs.num_decode_rows
        if inputs.num_rows == decodes:
            return self._decode(q, key_cache, value_cache, inputs, torch.empty_like(q))
        prefilled = self._prefill(q[decodes:], key_cache, value_cache, inputs, self._scale)
        if decodes == 0:
            return prefilled
        out = torch.empty_like(q)
        out[decodes:] = prefilled
        return self._decode(q, key_cache, value_cache, inputs, out)

    def decode(
        self, projected: Projected, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> None:
        """Nothing is faster in one."""

    def _decode(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        inputs: StepInputs,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Fill the decode rows of `out` and return it."""
        decodes = inputs.num_decode_rows
        paged_attention_triton(
            q[:decodes],
            key_cache,
            value_cache,
            inputs.block_tables[:decodes],
            self._scale,
            inputs.attention_plan,
            out[:decodes],
        )
        return out


_Prefill = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, StepInputs, float], torch.Tensor]


def _find_prefill(block_size: int, device: torch.device) -> _Prefill:
    """Return prefill by flash-attn-4 where it is installed and the GPU can run it, else by flash-attn 2."""
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    if _is_installed("flash-attn-4") and hopper:
        return _flash_attn_4()
    if not _is_installed("flash-attn"):
        reason = "is not installed" if hopper else "needs flash-attn 2 on a GPU older than Hopper"
        raise ModelError(f"attention backend flash {reason}: {_INSTALL}")
    if block_size % 256:
        raise ModelError(
            f"flash-attn 2 needs a block size that is a multiple of 256, not {block_size}: "
            "set --block-size 256, install flash-attn-4, or use attention backend triton"
        )
    return _flash_attn_2()


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _import_function(package: str, module: str, argument: str) -> Callable[..., torch.Tensor]:
    """Import flash_attn_varlen_func and check that it knows `argument`, by which it reads a paged cache."""
    try:
        function: Callable[..., torch.Tensor] = import_module(module).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{package} {version(package)} is installed but does not work ({error}): {_INSTALL}"
        ) from error
    if argument not in inspect.signature(function).parameters:
        raise ModelError(f"{package} {version(package)} cannot read a paged cache (no {argument}): {_INSTALL}")
    return function


def _flash_attn_4() -> _Prefill:
    function = _import_function("flash-attn-4", "flash_attn.cute", "page_table")

    def prefill(
        q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs, scale: float
    ) -> torch.Tensor:
        decodes = inputs.num_decode_rows
        out, _ = function(
            q,
            key_cache,
            value_cache,
            cu_seqlens_q=inputs.query_starts[decodes:] - decodes,
            seqused_k=inputs.kv_lens[decodes:],
            page_table=inputs.block_tables[decodes:],
            max_seqlen_q=inputs.max_query_len,
            max_seqlen_k=inputs.max_kv_len,
            softmax_scale=scale,
            causal=True,
        )
        return out

    return prefill


def _flash_attn_2() -> _Prefill:
    function = _import_function("flash-attn", "flash_attn", "block_table")

    def prefill(
        q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs, scale: float
    ) -> torch.Tensor:
        decodes = inputs.num_decode_rows
        return function(
            q,
            key_cache,
            value_cache,
            cu_seqlens_q=inputs.query_starts[decodes:] - decodes,
            cu_seqlens_k=F.pad(inputs.kv_lens[decodes:].cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=inputs.max_query_len,
            max_seqlen_k=inputs.max_kv_len,
            softmax_scale=scale,
            causal=True,
            block_table=inputs.block_tables[decodes:],
        )

    return prefill
