"""RoPE tables against transformers' rope utilities, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config as ReferenceConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from model.config import Qwen3Config
from model.layers import RotaryEmbedding

BASE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        YARN,
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "attention_factor": 0.75},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
        {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 8},
    ],
)
@pytest.mark.parametrize("length", [200, 700])
def test_table_equals_transformers(rope: dict[str, Any], head_dim: int, length: int) -> None:
    reference = ReferenceConfig(**BASE, head_dim=head_dim, rope_parameters=dict(rope))
    cos, sin = Qwen3RotaryEmbedding(reference)(torch.empty(1), torch.arange(length)[None])
    config = Qwen3Config.from_dict({**reference.to_dict(), "architectures": ["Qwen3ForCausalLM"]})
    table = RotaryEmbedding(config.rope, head_dim, length, device=torch.device("cpu")).cos_sin
    half = head_dim // 2
    assert table.dtype == torch.float32
    assert torch.equal(table[:, :half], cos[0, :, :half])
    assert torch.equal(table[:, half:], sin[0, :, :half])


def test_table_is_made_when_leaving_meta() -> None:
    config = Qwen3Config.from_dict({**ReferenceConfig(**BASE).to_dict(), "architectures": None})
    expected = RotaryEmbedding(config.rope, config.head_dim, 50, device=torch.device("cpu"))
    rotary = RotaryEmbedding(config.rope, config.head_dim, 50, device=torch.device("meta"))
    assert rotary.cos_sin.is_meta
    rotary.to_empty(device="cpu").reset()
    assert torch.equal(rotary.cos_sin, expected.cos_sin)
