"""Qwen3, dense: the forward pass of one tensor-parallel rank, from token ids to logits.

Reads like the architecture: pre-norm decoder layers of grouped-query attention with per-head q/k norms and a SwiGLU
MLP. The residual stream travels beside what is normed of it. Each norm is given to the projection before it, which adds
to the stream: it can norm it as well while it has it at hand, and that saves a launch for each norm of a decode step.
What a step is about arrives as one explicit `StepInputs`; keys and values live in a cache that the caller owns.
Nothing here waits for the device or depends on the values of tensors, so a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from model.attention import AttentionBackend, CapturedSteps
from model.config import Qwen3Config
from model.inputs import StepInputs
from model.kernels.linear import load_gates
from model.kernels.norm import Normed
from model.kernels.rope_kv import Projected
from model.layers import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    Part,
    QKVParallelLinear,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    SiluAndMul,
    VocabParallelEmbedding,
)
from model.layers.shard import empty_parameter
from model.parallel import TensorParallel
from model.peer_sums import Place


class Qwen3Attention(nn.Module):
    """Grouped-query attention over the paged KV cache; q and k are normed per head and rotated first."""

    def __init__(
        self,
        config: Qwen3Config,
        rotary_emb: RotaryEmbedding,
        attention: AttentionBackend,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads // tp.size
        self.num_kv_heads = config.kv_heads_per_rank(tp.size)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            tp=tp,
            dtype=dtype,
            device=device,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            tp=tp,
            place=Place.ATTENTION,
            dtype=dtype,
            device=device,
        )
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
        self.rotary_emb = rotary_emb
        self.attn = attention

    def forward(
        self,
        normed: Normed,
        residual: torch.Tensor,
        next_norm: RMSNorm,
        inputs: StepInputs,
        kv_cache: torch.Tensor,
    ) -> tuple[Normed, torch.Tensor]:
        """Add attention of `normed` to `residual`, both [tokens, hidden]: return (next_norm of the sum, the sum).

        kv_cache: [2, num_blocks, block_size, kv_heads, head_dim] of this layer.
        """
        key_cache, value_cache = kv_cache.unbind(0)
        projected = Projected(
            qkv=self.qkv_proj(normed),
            q_weight=self.q_norm.weight,
            k_weight=self.k_norm.weight,
            cos_sin=self.rotary_emb.cos_sin,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            eps=self.q_norm.eps,
        )
        attended = self.attn.decode(projected, key_cache, value_cache, inputs)
        if attended is None:
            q = projected.store(inputs.positions, inputs.kv_slots, key_cache, value_cache)
            attended = self.attn.forward(q, key_cache, value_cache, inputs)
        return self.o_proj(attended.flatten(1), residual, next_norm)


class Qwen3MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), with gate and up in one projection."""

    def __init__(self, config: Qwen3Config, *, tp: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [intermediate_size] * 2, bias=False, tp=tp, dtype=dtype, device=device
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias=False, tp=tp, place=Place.MLP, dtype=dtype, device=device
        )
        self.act_fn = SiluAndMul()

    def forward(self, normed: Normed, residual: torch.Tensor, next_norm: RMSNorm) -> tuple[Normed, torch.Tensor]:
        """Add the MLP of `normed` to `residual`, both [tokens, hidden]: return (next_norm of the sum, the sum)."""
        return self.down_proj(self.gate_up_proj(normed, then=self.act_fn), residual, next_norm)


class Qwen3DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm. The layer before applies this one's first norm, and this one the first
    norm of the layer behind it, or the model's last."""

    def __init__(
        self,
        config: Qwen3Config,
        rotary_emb: RotaryEmbedding,
        attention: AttentionBackend,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, rotary_emb, attention, tp=tp, dtype=dtype, device=device)
        self.mlp = Qwen3MLP(config, tp=tp, dtype=dtype, device=device)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(
        self,
        normed: Normed,
        residual: torch.Tensor,
        next_norm: RMSNorm,
        inputs: StepInputs,
        kv_cache: torch.Tensor,
    ) -> tuple[Normed, torch.Tensor]:
        """(input_layernorm(residual), residual), both [tokens, hidden], to (next_norm(output), this layer's output)."""
        normed, residual = self.self_attn(normed, residual, self.post_attention_layernorm, inputs, kv_cache)
        return self.mlp(normed, residual, next_norm)


class Qwen3Model(nn.Module):
    """Embedding, decoder layers and the last norm."""

    def __init__(
        self,
        config: Qwen3Config,
        attention: AttentionBackend,
        *,
        max_model_len: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device
        )
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim, max_model_len, device=device)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, self.rotary_emb, attention, tp=tp, dtype=dtype, device=device)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(self, inputs: StepInputs, kv_cache: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after the last norm: [tokens, hidden]."""
        norms: list[Any] = [*(layer.input_layernorm for layer in self.layers), self.norm]
        normed, residual = self.embed_tokens(inputs.token_ids, norms[0])
        for layer, next_norm, layer_cache in zip(self.layers, norms[1:], kv_cache.unbind(0), strict=True):
            normed, residual = layer(normed, residual, next_norm, inputs, layer_cache)
        return normed.finish()


class Qwen3ForCausalLM(nn.Module):
    """Qwen3 with its language-modelling head; one rank's part of it.

    Args:
        attention: computes attention for every layer, with this rank's head counts.
        max_model_len: longest sequence in tokens; positions are below it.
        tp: this rank's place. `config.check_parallel(tp.size)` must have passed.
        dtype: of weights, activations and KV cache.
        device: where parameters are made, without values. On `meta` the model has shapes only, until `materialize`.
    """

    packed_modules_mapping: ClassVar[Mapping[str, tuple[str, Part]]] = MappingProxyType(
        {
            "q_proj": ("qkv_proj", "q"),
            "k_proj": ("qkv_proj", "k"),
            "v_proj": ("qkv_proj", "v"),
            "gate_proj": ("gate_up_proj", 0),
            "up_proj": ("gate_up_proj", 1),
        }
    )
    """Name in the checkpoint -> (module that holds it, which part of that module's weight)."""

    def __init__(
        self,
        config: Qwen3Config,
        attention: AttentionBackend,
        *,
        max_model_len: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config = config
        self._attention = attention
        self.model = Qwen3Model(config, attention, max_model_len=max_model_len, tp=tp, dtype=dtype, device=device)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device)
        self._tie_weights()

    def forward(self, inputs: StepInputs, kv_cache: torch.Tensor) -> torch.Tensor:
        """Run one step: write its keys and values into the cache and return its hidden states.

        kv_cache: [layers, 2, num_blocks, block_size, kv_heads of this rank, head_dim], keys at 0 and values at 1.
        Returns [tokens, hidden] in the model's dtype, the same on every rank.
        """
        inputs.attention_plan = self._attention.plan(inputs)
        return self.model(inputs, kv_cache)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [rows, vocab_size] in the model's dtype, contiguous, the same on every rank."""
        return self.lm_head(hidden_states)

    def compute_logits_share(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [ceil(rows / tp.size), vocab_size]: those rows of `compute_logits` that `sample_share` of
        this rank draws from."""
        return self.lm_head.forward_share(hidden_states)

    def load_kernels(self, most_tokens: int) -> None:
        """Compile and load the kernels of which the very number of a step's tokens, up to so many, decides on one."""
        layer = self.model.layers[0]
        assert isinstance(layer, Qwen3DecoderLayer)
        load_gates(layer.mlp.gate_up_proj.weight, most_tokens)

    @property
    def graphs(self) -> CapturedSteps:
        """Which steps may be captured in a CUDA graph; the attention backend decides."""
        return self._attention.graphs

    def materialize(self, device: torch.device) -> None:
        """Give a model made on `meta` memory on `device`; its weights then hold no values yet."""
        # Not `to_empty`: what it does with tensors on `meta` is Python, which imports sympy, half a second and more.
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, empty_parameter(*parameter.shape, dtype=parameter.dtype, device=device))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        self._tie_weights()
        self.model.rotary_emb.reset()

    def _tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
