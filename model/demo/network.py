"""Qwen3 as plain functions of its weights, for training and for quick checks of what has been learnt.

Weights are a dictionary under the names of the checkpoint's tensors. Everything but attention sees the tokens of all
rows as one long list, so that its shapes stay the same whatever the rows' length is: it is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Weights = Mapping[str, torch.Tensor]

_LAYER_TENSORS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
EMBEDDING = "model.embed_tokens.weight"
LAST_NORM = "model.norm.weight"
EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers that make a Qwen3."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 448
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100_000.0
    context_length: int = 4096

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the checkpoint."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_width, hidden),
            "self_attn.k_proj": (kv_width, hidden),
            "self_attn.v_proj": (kv_width, hidden),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "self_attn.o_proj": (hidden, q_width),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        sizes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, hidden)}
        for index in range(self.layers):
            sizes |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
        return {**sizes, LAST_NORM: (hidden,)}


def initial_weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """fp32 weights: norms at 1, matrices normal; what is added to the residual stream starts small."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, size in shape.sizes().items():
        if len(size) == 1:
            weights[name] = torch.ones(size)
            continue
        std = 0.05 if name == EMBEDDING else size[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= (2 * shape.layers) ** -0.5
        weights[name] = torch.randn(size, generator=generator) * std
    return weights


# -- the pieces -------------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPSILON) * gain).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, halves paired. x: [tokens, heads, head_dim]; cos, sin: [tokens, head_dim / 2] fp32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def project(
    x: torch.Tensor,  # [tokens, hidden]
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    q_gain: torch.Tensor,
    k_gain: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first part of a layer: queries, keys and values, each [tokens, heads, head_dim]."""
    h = rms_norm(x, norm)
    head_dim = q_gain.numel()
    q = rms_norm(linear(h, q_weight).unflatten(-1, (-1, head_dim)), q_gain)
    k = rms_norm(linear(h, k_weight).unflatten(-1, (-1, head_dim)), k_gain)
    v = linear(h, v_weight).unflatten(-1, (-1, head_dim))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def mix(
    x: torch.Tensor,  # [tokens, hidden]
    attended: torch.Tensor,  # [tokens, heads * head_dim]
    o_weight: torch.Tensor,
    norm: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """The second part of a layer: what attention found, then the MLP."""
    x = x + linear(attended, o_weight)
    h = rms_norm(x, norm)
    return x + linear(F.silu(linear(h, gate)) * linear(h, up), down)


def head_loss(
    x: torch.Tensor, norm: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the cross entropies."""
    logits = linear(rms_norm(x, norm), embedding).float()
    return (F.cross_entropy(logits, targets, reduction="none") * token_weights).sum()


@dataclass(frozen=True, slots=True)
class Pieces:
    """The functions above, as they are or compiled."""

    project: Callable[..., Any] = project
    mix: Callable[..., Any] = mix
    head_loss: Callable[..., Any] = head_loss

    @classmethod
    def compiled(cls) -> Pieces:
        return cls(*(torch.compile(piece, dynamic=False) for piece in (project, mix, head_loss)))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    """Causal attention inside each row of `length` tokens. [tokens, heads, head_dim] -> [tokens, heads * head_dim]"""
    if q.dtype == torch.float32:
        # Flash attention alone shares keys between heads, and not in fp32; what is left then keeps all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def rope_tables(shape: Shape, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position and frequency: two of [tokens, head_dim / 2], fp32."""
    exponents = torch.arange(0, shape.head_dim, 2, device=positions.device).float() / shape.head_dim
    angles = positions.float().unsqueeze(1) * shape.rope_theta**-exponents
    return angles.cos(), angles.sin()


def layer_weights(weights: Weights, index: int) -> list[torch.Tensor]:
    """The tensors of a layer: six for `project`, five for `mix`."""
    return [weights[f"model.layers.{index}.{name}.weight"] for name in _LAYER_TENSORS]


def loss_sum(
    weights: Weights,
    shape: Shape,
    pieces: Pieces,
    ids: torch.Tensor,  # [rows * length]
    targets: torch.Tensor,  # [rows * length]
    token_weights: torch.Tensor,  # [rows * length] fp32
    length: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weighted sum of the next tokens' losses, activations in `dtype`."""
    positions = torch.arange(length, device=ids.device).repeat(ids.numel() // length)
    cos, sin = rope_tables(shape, positions)
    x = F.embedding(ids, weights[EMBEDDING]).to(dtype)
    for index in range(shape.layers):
        tensors = layer_weights(weights, index)
        q, k, v = pieces.project(x, cos, sin, *tensors[:6])
        x = pieces.mix(x, attend(q, k, v, length), *tensors[6:])
    return pieces.head_loss(x, weights[LAST_NORM], weights[EMBEDDING], targets, token_weights)


# -- generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    weights: Weights,
    shape: Shape,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_id: int,
    dtype: torch.dtype,
) -> list[list[int]]:
    """Continue prompts greedily, all at once, until `stop_id`, which is left out.

    Every row begins at position 0 of its part of the cache, and writes on where its own prompt ends.
    """
    device = weights[EMBEDDING].device
    weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    batch, width = len(prompts), max(map(len, prompts))
    ids = torch.zeros((batch, width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    size = (shape.layers, 2, batch, shape.kv_heads, width + max_new_tokens, shape.head_dim)
    cache = torch.zeros(size, dtype=dtype, device=device)
    tokens = _prefill(weights, shape, ids.to(device), lengths, cache)
    done = tokens == stop_id
    written = [tokens]
    for step in range(1, max_new_tokens):
        if step % 8 == 0 and bool(done.all()):
            break
        tokens = _decode(weights, shape, tokens, lengths + step - 1, cache, width + step)
        done |= tokens == stop_id
        written.append(tokens)
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


def _prefill(
    weights: Weights, shape: Shape, ids: torch.Tensor, lengths: torch.Tensor, cache: torch.Tensor
) -> torch.Tensor:
    """Fill the cache with the prompts, [rows, width], padded at their ends; returns the tokens that follow, [rows]."""
    batch, width = ids.shape
    cos, sin = rope_tables(shape, torch.arange(width, device=ids.device).repeat(batch))
    x = F.embedding(ids.flatten(), weights[EMBEDDING])
    for index in range(shape.layers):
        tensors = layer_weights(weights, index)
        q, k, v = project(x, cos, sin, *tensors[:6])
        for slot, part in enumerate((k, v)):
            cache[index, slot, :, :, :width] = part.unflatten(0, (batch, width)).transpose(1, 2)
        x = mix(x, attend(q, k, v, width), *tensors[6:])
    last = torch.arange(batch, device=ids.device) * width + lengths - 1
    return _next_tokens(weights, x[last])


def _decode(
    weights: Weights, shape: Shape, tokens: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, size: int
) -> torch.Tensor:
    """One token of every row, at positions below `size`; returns the tokens that follow. All but the cache: [rows]"""
    cos, sin = rope_tables(shape, positions)
    rows = torch.arange(tokens.numel(), device=tokens.device)
    mask = (torch.arange(size, device=tokens.device) <= positions.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
    x = F.embedding(tokens, weights[EMBEDDING])
    for index in range(shape.layers):
        tensors = layer_weights(weights, index)
        q, k, v = project(x, cos, sin, *tensors[:6])
        for slot, part in enumerate((k, v)):
            cache[index, slot, rows, :, positions] = part
        k, v = cache[index, :, :, :, :size]
        out = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=mask, enable_gqa=True)
        x = mix(x, out.flatten(1), *tensors[6:])
    return _next_tokens(weights, x)


def _next_tokens(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    return linear(rms_norm(x, weights[LAST_NORM]), weights[EMBEDDING]).float().argmax(-1)
