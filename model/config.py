"""What a Qwen3 checkpoint is, read from its config.json and checked completely before anything is built from it.

Both spellings of Hugging Face transformers are understood: version 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
version 5 (`rope_parameters`, `dtype`). Never imports torch, so that a process without a device can read it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from model.errors import ModelError

DTypeName = Literal["bfloat16", "float16", "float32"]
RopeType = Literal["default", "linear", "dynamic", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions become angles; `model/layers/rotary.py` has the formulas."""

    rope_type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int  # the context that the checkpoint was trained on, before any scaling
    # YaRN only
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config:
    """The shape of one dense Qwen3 checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    tie_word_embeddings: bool
    dtype: DTypeName
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read `folder`/config.json.

        Raises:
            ModelError: there is no such folder or file, it is not JSON, or it does not describe a dense Qwen3.
        """
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise ModelError(f"{folder}: no such folder; give one that holds a Qwen3 checkpoint in Hugging Face format")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file; a checkpoint in Hugging Face format has one") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read as JSON ({error}); download it again") from error
        if not isinstance(raw, dict):
            raise ModelError(f"{path}: expected a JSON object, found {type(raw).__name__}; download it again")
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Self:
        """Check the contents of a config.json; `source` names it in errors.

        Defaults of absent keys are those of transformers' Qwen3Config, except that `num_key_value_heads` falls back to
        `num_attention_heads` and the dtype to bfloat16.

        Raises:
            ModelError: it does not describe a dense Qwen3 that this server can run.
        """
        fields = _Fields(raw, source)
        _check_architecture(fields)
        _check_features(fields)
        hidden_size = fields.positive_int("hidden_size")
        num_heads = fields.positive_int("num_attention_heads")
        max_position = fields.positive_int("max_position_embeddings", 32_768)
        config = cls(
            vocab_size=fields.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive_int("intermediate_size"),
            num_hidden_layers=fields.positive_int("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=fields.positive_int("num_key_value_heads", num_heads),
            head_dim=fields.positive_int("head_dim", 128),
            max_position_embeddings=max_position,
            rms_norm_eps=fields.positive_float("rms_norm_eps", 1e-6),
            rope=_rope_config(fields, max_position),
            attention_bias=fields.boolean("attention_bias", False),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            dtype=_dtype(fields),
            eos_token_ids=_eos_token_ids(fields),
        )
        _check_shapes(config, fields)
        return config

    @property
    def max_context(self) -> int:
        """Longest sequence in tokens that the checkpoint can serve, its RoPE scaling included."""
        if self.rope.rope_type == "default":
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.rope.original_max_position * self.rope.factor))

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' matrices: a token costs two operations for each, attention and head left out."""
        attention = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        return self.num_hidden_layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    def check_parallel(self, size: int) -> None:
        """Refuse a tensor-parallel size that does not divide this model.

        KV heads need not divide: where there are more ranks than KV heads, each head is held by several ranks. Nor does
        the vocabulary: the last ranks' shards are padded.

        Raises:
            ModelError: naming the number that does not divide.
        """
        for what, number in (
            ("query heads", self.num_attention_heads),
            ("rows of the MLP (intermediate_size)", self.intermediate_size),
        ):
            if number % size:
                divisors = ", ".join(str(n) for n in range(1, 65) if self._divides(n))
                raise ModelError(
                    f"tensor-parallel size {size} does not divide the model's {number} {what}; use one of {divisors}"
                )
        if not self._kv_heads_divide(size):
            raise ModelError(
                f"tensor-parallel size {size} and the model's {self.num_key_value_heads} KV heads do not divide each "
                f"other; use one of {', '.join(str(n) for n in range(1, 65) if self._divides(n))}"
            )

    def kv_heads_per_rank(self, size: int) -> int:
        """KV heads that each of `size` ranks holds; at least one."""
        return max(1, self.num_key_value_heads // size)

    def _kv_heads_divide(self, size: int) -> bool:
        return self.num_key_value_heads % size == 0 or size % self.num_key_value_heads == 0

    def _divides(self, size: int) -> bool:
        return (
            self.num_attention_heads % size == 0 and self.intermediate_size % size == 0 and self._kv_heads_divide(size)
        )


class _Fields:
    """Typed access to the JSON object, with errors that name file, key and value."""

    def __init__(self, raw: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self._raw = raw
        self._source = source
        self._prefix = prefix

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self._source}: {self._prefix}{key} {problem}")

    def get(self, key: str) -> Any:
        return self._raw.get(key)

    def section(self, key: str) -> _Fields | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, found {value!r}")
        return _Fields(value, self._source, f"{self._prefix}{key}.")

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing; is this a complete Qwen3 config.json?")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, f"must be a positive integer, found {value!r}")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing; is this a complete Qwen3 config.json?")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(key, f"must be a positive number, found {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, found {value!r}")
        return value


def _check_architecture(fields: _Fields) -> None:
    architectures = fields.get("architectures")
    if architectures is not None and architectures != ["Qwen3ForCausalLM"]:
        raise fields.error(
            "architectures", f"is {architectures!r}; this server runs Qwen3ForCausalLM (dense Qwen3) only"
        )
    if fields.get("model_type") != "qwen3":
        raise fields.error("model_type", f"is {fields.get('model_type')!r}; this server runs qwen3 (dense) only")


def _check_features(fields: _Fields) -> None:
    """Refuse what would change the result if it were ignored."""
    if fields.get("hidden_act") not in (None, "silu"):
        raise fields.error("hidden_act", f"is {fields.get('hidden_act')!r}; only silu is implemented")
    if fields.boolean("use_sliding_window", False):
        raise fields.error("use_sliding_window", "is true; sliding-window attention is not implemented")
    if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
        raise fields.error("layer_types", "has layers other than full_attention, which are not implemented")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "is set; quantized checkpoints are not supported, use the bf16 one")


def _check_shapes(config: Qwen3Config, fields: _Fields) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise fields.error(
            "num_key_value_heads",
            f"is {config.num_key_value_heads}, which does not divide the {config.num_attention_heads} attention heads",
        )
    if config.head_dim % 2 or config.head_dim < 4:
        raise fields.error("head_dim", f"is {config.head_dim}; rotary embedding needs an even number from 4")
    if config.rope.theta <= 1:
        raise fields.error("rope_theta", f"is {config.rope.theta}; it must be greater than 1")
    if any(not 0 <= token < config.vocab_size for token in config.eos_token_ids):
        raise fields.error("eos_token_id", f"{config.eos_token_ids} is outside the vocabulary of {config.vocab_size}")


def _dtype(fields: _Fields) -> DTypeName:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    name = fields.get(key)
    if name is None:
        return "bfloat16"
    if name not in get_args(DTypeName):
        raise fields.error(key, f"is {name!r}; there are {', '.join(get_args(DTypeName))}")
    return cast(DTypeName, name)


def _eos_token_ids(fields: _Fields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise fields.error("eos_token_id", f"must be one token id or a list of them, found {value!r}")
    return tuple(ids)


def _rope_config(fields: _Fields, max_position: int) -> RopeConfig:
    rope = fields.section("rope_parameters") or fields.section("rope_scaling")
    top_level_theta = fields.positive_float("rope_theta", 10_000.0)
    if rope is None:
        return RopeConfig(theta=top_level_theta, original_max_position=max_position)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in get_args(RopeType):
        raise rope.error("rope_type", f"is {rope_type!r}; there are {', '.join(get_args(RopeType))}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.error("partial_rotary_factor", "is not 1; partly rotated heads are not implemented")
    theta = rope.positive_float("rope_theta", top_level_theta)
    if rope_type == "default":
        return RopeConfig(theta=theta, original_max_position=max_position)
    factor = rope.positive_float("factor")
    if factor < 1:
        raise rope.error("factor", f"must be at least 1, found {factor}")
    if rope_type != "yarn":
        return RopeConfig(
            rope_type=cast(RopeType, rope_type), theta=theta, factor=factor, original_max_position=max_position
        )
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position=rope.positive_int("original_max_position_embeddings", max_position),
        beta_fast=rope.positive_float("beta_fast", 32.0),
        beta_slow=rope.positive_float("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=rope.boolean("truncate", True),
    )


def _yarn_attention_factor(rope: _Fields, factor: float) -> float:
    """The square root of 1/t in the YaRN paper (arXiv:2309.00071, section 3.4): 0.1 ln(factor) + 1, unless given.

    `mscale` and `mscale_all_dim`, where both are set, weigh it as transformers does.
    """
    if rope.get("attention_factor") is not None:
        return rope.positive_float("attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        numerator, denominator = rope.positive_float("mscale"), rope.positive_float("mscale_all_dim")
        return (0.1 * numerator * math.log(factor) + 1.0) / (0.1 * denominator * math.log(factor) + 1.0)
    return 0.1 * math.log(factor) + 1.0
