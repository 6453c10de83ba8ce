"""The bundled checkpoint: transformers takes it for what it says it is, and its files are what the code writes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.demo import bundle
from model.demo.chat import ADDED_TOKENS
from model.demo.network import Shape
from model.demo.tokenizer import VOCAB_SIZE, added_id, tokenizer_config

Render = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_checkpoint)


@pytest.fixture(scope="module")
def render(tokenizer: Any) -> Render:
    def apply(messages: list[dict[str, Any]], **options: Any) -> str:
        options = {"add_generation_prompt": True, **options}
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    return apply


def test_it_is_small_enough_for_a_repository(demo_checkpoint: Path) -> None:
    files = [path for path in demo_checkpoint.iterdir() if path.is_file() and path.suffix != ".py"]
    assert sum(path.stat().st_size for path in files) <= 14_000_000


def test_config_and_template_are_those_of_the_code(demo_checkpoint: Path, tmp_path: Path) -> None:
    """A template that is mended in the code has to reach the checkpoint too."""
    bundle.write_config(tmp_path, Shape())
    for name in ("config.json", "generation_config.json"):
        assert (demo_checkpoint / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert json.loads((demo_checkpoint / "tokenizer_config.json").read_text()) == tokenizer_config()


def test_transformers_loads_every_tensor(demo_checkpoint: Path) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(demo_checkpoint, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.bfloat16
    problems = {key: value for key, value in loading.items() if value}
    assert not problems
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_shapes_allow_two_and_four_ranks(demo_checkpoint: Path) -> None:
    config = json.loads((demo_checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads % 4 == 0
    assert kv_heads == 2, "with 4 ranks the KV heads have to be replicated"
    assert config["head_dim"] in (64, 128)
    assert heads > kv_heads
    assert config["head_dim"] * heads != config["hidden_size"], "head_dim is a parameter of its own, as in Qwen3"


def test_transformers_lets_it_think_and_answer(demo_checkpoint: Path, tokenizer: Any, render: Render) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    prompt = tokenizer(render([{"role": "user", "content": "What is 478 + 256?"}]), return_tensors="pt")
    (ids,) = model.generate(**prompt, do_sample=False, top_k=None, top_p=None, temperature=None, max_new_tokens=200)
    text = tokenizer.decode(ids[prompt["input_ids"].shape[1] :])
    thought, _, answer = text.partition("</think>\n\n")
    assert thought.startswith("<think>\n478 + 256\n")
    assert answer == "478 + 256 = 734<|im_end|>"


@pytest.mark.parametrize(
    "text", ["Hello, world!", "你好，世界 🌍", "  tabs\tand\n\nlines ", "def f(x): return x**2", "e\u0301", ""]
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= token < VOCAB_SIZE for token in ids)


def test_tokenizer_compresses(tokenizer: Any) -> None:
    text = "What is the favourite colour of Anna? The text says that she lives near the harbour."
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_added_tokens_stand_at_the_end_of_the_vocabulary(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    for token in ADDED_TOKENS:
        assert tokenizer.encode(f"a{token}b")[1] == added_id(token)
    assert tokenizer.eos_token_id == added_id("<|im_end|>")
    ids = tokenizer.encode("<|im_start|>x<think>y</think><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<think>y</think>"


def test_generation_config_names_both_ends(demo_checkpoint: Path) -> None:
    config = json.loads((demo_checkpoint / "generation_config.json").read_text())
    assert config["eos_token_id"] == [added_id("<|im_end|>"), added_id("<|endoftext|>")]


def test_template_of_a_plain_chat(render: Render) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    assert render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_switches_thinking_off(render: Render) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    open_end = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(messages, enable_thinking=True) == open_end
    assert render(messages, enable_thinking=False) == open_end + "<think>\n\n</think>\n\n"
    assert render(messages, add_generation_prompt=False).endswith("Hi<|im_end|>\n")


def test_template_keeps_only_the_reasoning_of_the_current_turn(render: Render) -> None:
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning_content": "old"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "new"},
    ]
    text = render(messages)
    assert "old" not in text
    assert "<|im_start|>assistant\n<think>\nnew\n</think>\n\ntwo<|im_end|>" in text


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("arguments", [{"city": "Bonn"}, '{"city": "Bonn"}'])
def test_template_of_tool_calls(render: Render, wrapped: bool, arguments: dict[str, str] | str) -> None:
    call: dict[str, Any] = {"name": "weather", "arguments": arguments}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call} if wrapped else call]},
        {"role": "tool", "content": "yes"},
        {"role": "tool", "content": "no"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    text = render(messages, tools=tools)
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in text
    call_text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call_text}<|im_end|>\n" in text
    answers = "\n<tool_response>\nyes\n</tool_response>\n<tool_response>\nno\n</tool_response>"
    assert f"<|im_start|>user{answers}<|im_end|>\n" in text
