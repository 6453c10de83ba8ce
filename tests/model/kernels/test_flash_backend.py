"""The flash backend: what it refuses, and on a GPU with flash-attn-4 what it computes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

from model.attention import flash_backend
from model.attention.flash_backend import FlashAttention
from model.errors import ModelError
from model.kernels.attention import paged_attention_torch
from tests.model.kernels.comparing import relative_error
from tests.model.kernels.test_attention import make_batch

HOPPER, AMPERE = (9, 0), (8, 0)


def build(**changes: Any) -> FlashAttention:
    arguments: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "scale": 0.125,
        "block_size": 64,
        "device": torch.device("cuda"),
        "dtype": torch.bfloat16,
    }
    return FlashAttention(**(arguments | changes))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to a GPU and to installed packages: machine(capability, {package: version}, {module: function})."""

    def pretend(capability: tuple[int, int], versions: dict[str, str], functions: dict[str, Any]) -> None:
        def version(package: str) -> str:
            if package not in versions:
                raise PackageNotFoundError(package)
            return versions[package]

        def import_module(name: str) -> Any:
            if name not in functions:
                raise ImportError(f"no {name}")
            return type("Module", (), {"flash_attn_varlen_func": staticmethod(functions[name])})

        monkeypatch.setattr(flash_backend, "version", version)
        monkeypatch.setattr(flash_backend, "import_module", import_module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


def test_refuses_float32() -> None:
    with pytest.raises(ModelError, match=r"not torch\.float32"):
        build(dtype=torch.float32)


@pytest.mark.parametrize(
    ("capability", "versions", "message"),
    [
        (HOPPER, {}, r"is not installed: pip install 'lightqwen\[flash\]'"),
        (AMPERE, {"flash-attn-4": "4.0.0b36"}, "needs flash-attn 2 on a GPU older than Hopper"),
        (HOPPER, {"flash-attn": "2.8.3"}, "multiple of 256, not 64"),
        (HOPPER, {"flash-attn-4": "4.0.0b36"}, r"flash-attn-4 4\.0\.0b36 is installed but does not work \(no flash"),
    ],
)
def test_says_what_is_missing(
    machine: Any, capability: tuple[int, int], versions: dict[str, str], message: str
) -> None:
    machine(capability, versions, {})
    with pytest.raises(ModelError, match=message):
        build()


def test_refuses_versions_without_paging(machine: Any) -> None:
    machine(HOPPER, {"flash-attn-4": "4.0.0b1"}, {"flash_attn.cute": lambda q, k, v: None})
    with pytest.raises(ModelError, match=r"4\.0\.0b1 cannot read a paged cache \(no page_table\)"):
        build()


def test_prefers_flash_attn_4(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill rows reach the package with starts of their own; its output lands behind that of the decode rows."""
    calls = []

    def varlen(q: torch.Tensor, *caches: torch.Tensor, page_table: torch.Tensor, **arguments: Any) -> Any:
        calls.append(arguments | {"page_table": page_table})
        return torch.full_like(q, 7.0), None

    machine(HOPPER, {"flash-attn-4": "4.0.0b36", "flash-attn": "2.8.3"}, {"flash_attn.cute": varlen})
    monkeypatch.setattr(flash_backend, "plan_attention", lambda starts, kv_lens, tables, **shape: (starts, kv_lens))
    monkeypatch.setattr(
        flash_backend,
        "paged_attention_triton",
        lambda q, keys, values, tables, scale, plan, out: paged_attention_torch(
            q, keys, values, tables, *plan, scale, out
        ),
    )
    batch = make_batch([(1, 40), (1, 0), (3, 9), (5, 20)], dtype=torch.bfloat16, device=torch.device("cpu"))
    backend = build(scale=batch.scale)
    inputs = batch.step_inputs(2)
    inputs.attention_plan = backend.plan(inputs)
    out = backend.forward(batch.q, batch.key_cache, batch.value_cache, inputs)
    assert relative_error(out[:2], batch.expected[:2]) < 1e-2
    assert (out[2:] == 7.0).all()
    assert calls[0]["cu_seqlens_q"].tolist() == [0, 3, 8]
    assert calls[0]["seqused_k"].tolist() == [9, 20]
    assert torch.equal(calls[0]["page_table"], batch.block_tables[2:])
    assert calls[0]["causal"] is True


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")  # flash-attn-4 4.0.0b36, of its own compiler
@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
def test_matches_attention_in_float64(triton_device: torch.device, block_size: int) -> None:
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    batch = make_batch(
        [(1, 300), (1, 17), (40, 40), (5, 200), (129, 500)],
        heads=16,
        kv_heads=8,
        head_dim=128,
        block_size=block_size,
        dtype=torch.bfloat16,
        device=triton_device,
    )
    batch.key_cache.nan_to_num_()
    batch.value_cache.nan_to_num_()
    backend = build(num_heads=16, num_kv_heads=8, head_dim=128, scale=batch.scale, block_size=block_size)
    inputs = batch.step_inputs(2)
    inputs.attention_plan = backend.plan(inputs)
    out = backend.forward(batch.q, batch.key_cache, batch.value_cache, inputs)
    assert relative_error(out, batch.expected) < 1e-2
