"""config.json is read as transformers reads it, and refused with a line that names the thing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from model.config import Qwen3Config
from model.errors import ModelError

# The published config.json of Qwen3-0.6B, in transformers 4's spelling.
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_reads_qwen3_0_6b(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    config = Qwen3Config.from_folder(tmp_path)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (28, 8, 128)
    assert (config.rope.rope_type, config.rope.theta) == ("default", 1e6)
    assert config.tie_word_embeddings
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (151645,)
    assert config.max_context == 40960


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, YARN])
def test_both_spellings_read_the_same(scaling: dict[str, Any] | None) -> None:
    old = {**QWEN3_0_6B, "rope_scaling": scaling}
    new = {key: value for key, value in QWEN3_0_6B.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": 1e6}, "dtype": "bfloat16"}
    assert Qwen3Config.from_dict(old) == Qwen3Config.from_dict(new)


def test_old_key_type_and_defaults() -> None:
    raw = {**QWEN3_0_6B, "rope_scaling": {"type": "yarn", "factor": 4.0}, "eos_token_id": [1, 2]}
    del raw["rope_theta"], raw["num_key_value_heads"], raw["head_dim"], raw["torch_dtype"]
    config = Qwen3Config.from_dict(raw)
    assert config.rope.original_max_position == 40960
    assert config.max_context == 163840
    assert config.rope.theta == 10_000
    assert (config.num_key_value_heads, config.head_dim, config.eos_token_ids) == (16, 128, (1, 2))


def test_yarn_context_and_attention_factor() -> None:
    config = Qwen3Config.from_dict({**QWEN3_0_6B, "rope_scaling": YARN})
    assert config.max_context == 131072
    assert config.rope.attention_factor == pytest.approx(1.1386294361)  # 0.1 ln 4 + 1
    given = Qwen3Config.from_dict({**QWEN3_0_6B, "rope_scaling": {**YARN, "attention_factor": 0.5}})
    assert given.rope.attention_factor == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": None, "model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window attention is not implemented"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints are not supported"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, found 0"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers must be a positive integer, found '28'"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, found True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide the 16"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "float8"}, "torch_dtype is 'float8'"),
        ({"eos_token_id": 151936}, "outside the vocabulary of 151936"),
        ({"eos_token_id": "<eos>"}, "eos_token_id must be one token id"),
        ({"rope_theta": 1}, "rope_theta is 1.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.rope_type is 'llama3'; there are default",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 8.0}}, "rope_scaling.rope_type is ['yarn']"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Qwen3Config.from_dict({**QWEN3_0_6B, **change}, source="here/config.json")
    assert str(caught.value).startswith("here/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object, found list"),
    ],
)
def test_refuses_files(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        Qwen3Config.from_folder(tmp_path)


def test_refuses_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        Qwen3Config.from_folder(tmp_path / "nowhere")


def test_parallel_sizes() -> None:
    config = Qwen3Config.from_dict(QWEN3_0_6B)
    for size, kv_heads in ((1, 8), (2, 4), (8, 1), (16, 1)):
        config.check_parallel(size)
        assert config.kv_heads_per_rank(size) == kv_heads
    with pytest.raises(
        ModelError, match=r"size 3 does not divide the model's 16 query heads; use one of 1, 2, 4, 8, 16$"
    ):
        config.check_parallel(3)
    narrow = dataclasses.replace(config, intermediate_size=3070)
    with pytest.raises(ModelError, match="size 4 does not divide the model's 3070 rows of the MLP"):
        narrow.check_parallel(4)
    odd = dataclasses.replace(config, num_attention_heads=12, num_key_value_heads=6)
    with pytest.raises(
        ModelError, match="size 4 and the model's 6 KV heads do not divide each other; use one of 1, 2, 3"
    ):
        odd.check_parallel(4)
