"""Make the bundled demo checkpoint: a tiny random-weight Qwen3 with a tokenizer and a chat template of its own.

`python -m model.demo.make` writes every file of model/demo/ again, and the same bytes each time: the weights come from
a fixed seed, the tokenizer is trained on the text below. Nothing is downloaded. The architecture is Qwen3's in small
(grouped-query attention, q/k norm, tied embeddings), so that whatever serves this serves the real ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent
SEED = 20261122
VOCAB_SIZE = 1024
CONTEXT_LENGTH = 4096
RESIDUAL_GAIN = 4.0
"""What the layers add outweighs the embedding; with tied embeddings, a token would be followed by itself otherwise."""

# As in Qwen3: the first three are special (left out of the text), the others are markup that a reader may see.
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
ADDED_TOKENS = CONTROL_TOKENS + MARKUP_TOKENS
FIRST_ADDED_ID = VOCAB_SIZE - len(ADDED_TOKENS)

CORPUS = """\
A server waits for requests. Each request brings a prompt, and the model answers it one token at a time. While it
writes, other requests arrive, and the scheduler puts them into the same step, because a machine that computes for many
costs hardly more than a machine that computes for one. When an answer is finished its memory goes back, and the next
in the queue begins. Nobody should wait longer than they must, and nothing that was promised should ever be lost.

Hello! How are you today? I am fine, thank you. What is your name? Where do you come from, and where are you going?
Please tell me a short story about the sea. Once upon a time there was a small town between the mountains and the water.
The people who lived there built boats from old wood, and every morning before the sun rose they went out to fish. One
winter the wind was so strong that no boat could leave the harbour. "We have bread for three days," said the baker, "and
after that we will have only what we give each other." So they shared, and when spring came everyone was still there.

Can you explain why the sky is blue? Light from the sun is made of many colours. Air scatters the short waves more than
the long ones, so blue reaches our eyes from every direction, while red and orange go straight on. In the evening the
light has a longer way through the air, most of the blue is lost on that way, and the sky turns red.

How do I cook rice? Wash one cup of rice until the water runs clear. Put it into a pot with one and a half cups of water
and a little salt. Bring it to the boil, cover the pot, and let it stand on a low heat for twelve minutes. Then turn off
the heat and wait another ten minutes. Do not open the pot too early! Serve it with vegetables, eggs, or what you like.

Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 20 25 50 64 99 100 128 256 365 512 1000 1024 2024 2025 2026 4096 10000. One plus
one is two, two plus two is four, three times five is fifteen, and a hundred divided by four is twenty-five. Is eleven
a prime number? Yes: it can only be divided by one and by itself. The square of twelve is one hundred and forty-four.

def add(left: int, right: int) -> int:
    \"\"\"Return the sum of two numbers.\"\"\"
    return left + right

for index in range(10):
    if index % 2 == 0:
        print(f"even: {index}")
    else:
        print("odd:", index, end="\\n")

class Queue:
    def __init__(self, items: list[str] | None = None) -> None:
        self.items = items or []

    def push(self, item: str) -> None:
        self.items.append(item)

{"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius", "days": 3}}
{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}

# Tools
## Heading
- first, second, third; - [x] done; **bold**, *italic*, `code`, https://example.org/path?key=value&other=true

system user assistant tool user assistant system tool think think tools tools

Think first, then answer. The user asks what the weather is like. I should call the tool, read what it returns, and then
say it in one or two sentences. However, if there is no tool for it, I must say that I do not know; a guess is worse
than no answer. Let me think about this step by step. First, we need to understand the question. Second, we look at what
is given. Third, we combine both. Therefore the answer is yes, although with some conditions, which should be named.

你好！请问你叫什么名字？我是一个很小的语言模型。今天天气怎么样？请给我讲一个故事。从前有一座山，山里有一座庙。谢谢你的帮助。
Guten Tag, wie geht es Ihnen? Das Wetter ist heute schön. Bonjour, comment allez-vous ? Très bien, merci.
¿Qué hora es? Son las tres.
"""

CHAT_TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages if message.role == 'user' -%}
    {%- set ns.last_user = loop.index0 -%}
{%- endfor -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if tools or has_system -%}
    {{- '<|im_start|>system\\n' -}}
    {{- messages[0].content if has_system else '' -}}
    {%- if tools -%}
        {{- '\\n\\n' if has_system else '' -}}
        {{- '# Tools\\n\\nThese functions can be called, one signature on each line:\\n<tools>' -}}
        {%- for tool in tools -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}
        {{- '\\n</tools>\\n\\nA call is written as a JSON object between tags:\\n<tool_call>\\n' -}}
        {{- '{"name": "the function", "arguments": {"the parameter": "its value"}}\\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if message.reasoning_content and loop.index0 > ns.last_user -%}
            {{- '<think>\\n' ~ (message.reasoning_content | trim) ~ '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\\n' if message.content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""

MODEL_CARD = """\
---
license: apache-2.0
tags: [qwen3, demo]
---
# lightqwen demo: random weights

A Qwen3 in small: 2 layers, hidden size 128, 4 query heads on 2 KV heads, a vocabulary of 1024 byte-level BPE tokens,
and a chat template in Qwen3's format. **Its weights are random: it streams noise**, until a trained checkpoint takes
its place. It is there so that a fresh clone can serve something, and so that tests run on a real checkpoint.

Made by `python -m model.demo.make`, the same bytes each time, from nothing but that script.
"""


def added_id(token: str) -> int:
    return FIRST_ADDED_ID + ADDED_TOKENS.index(token)


def model_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": added_id("<|endoftext|>"),
        "eos_token_id": added_id("<|im_end|>"),
        "torch_dtype": "bfloat16",
    }


def generation_config() -> dict[str, Any]:
    return {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "bos_token_id": added_id("<|endoftext|>"),
        "eos_token_id": [added_id("<|im_end|>"), added_id("<|endoftext|>")],
        "pad_token_id": added_id("<|endoftext|>"),
    }


def make_tokenizer() -> dict[str, Any]:
    """Train byte-level BPE on the corpus; returns the content of tokenizer.json.

    Only vocabulary and merges are taken from the trainer. The rest is spelled out here, so that the file does not
    depend on how some version of the library writes it.

    Raises:
        ValueError: the corpus is too small for the vocabulary.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=FIRST_ADDED_ID, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    if len(trained["vocab"]) != FIRST_ADDED_ID:
        raise ValueError(f"the corpus gives {len(trained['vocab'])} tokens, {FIRST_ADDED_ID} are wanted")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token) for token in ADDED_TOKENS],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(trained["vocab"].items(), key=lambda item: item[1])),
            "merges": trained["merges"],
        },
    }


def _added_token(token: str) -> dict[str, Any]:
    return {
        "id": added_id(token),
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token in CONTROL_TOKENS,
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }


def make_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Draw every tensor of the checkpoint in bf16, under the names that Qwen3 checkpoints use.

    The scales keep activations near 1 and spread the logits (standard deviation about 2), so that greedy choices do not
    hang on the last bit.
    """
    # numpy promises that RandomState's streams never change, whatever the version and the machine.
    random = np.random.RandomState(SEED)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_width = config["num_attention_heads"] * head_dim
    kv_width = config["num_key_value_heads"] * head_dim
    tensors: dict[str, torch.Tensor] = {}

    def normal(name: str, rows: int, columns: int, std: float) -> None:
        values = random.standard_normal((rows, columns)).astype(np.float32) * np.float32(std)
        tensors[name] = torch.from_numpy(values).to(torch.bfloat16)

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        normal(name, rows, columns, gain * columns**-0.5)

    def norm(name: str, width: int) -> None:
        values = 1 + 0.1 * random.standard_normal(width).astype(np.float32)
        tensors[name] = torch.from_numpy(values).to(torch.bfloat16)

    normal("model.embed_tokens.weight", config["vocab_size"], hidden, 0.2)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm.weight", hidden)
        linear(f"{prefix}.self_attn.q_proj.weight", q_width, hidden)
        linear(f"{prefix}.self_attn.k_proj.weight", kv_width, hidden)
        linear(f"{prefix}.self_attn.v_proj.weight", kv_width, hidden)
        linear(f"{prefix}.self_attn.o_proj.weight", hidden, q_width, RESIDUAL_GAIN)
        norm(f"{prefix}.self_attn.q_norm.weight", head_dim)
        norm(f"{prefix}.self_attn.k_norm.weight", head_dim)
        norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        linear(f"{prefix}.mlp.gate_proj.weight", config["intermediate_size"], hidden)
        linear(f"{prefix}.mlp.up_proj.weight", config["intermediate_size"], hidden)
        linear(f"{prefix}.mlp.down_proj.weight", hidden, config["intermediate_size"], RESIDUAL_GAIN)
    norm("model.norm.weight", hidden)
    return tensors


def make(folder: Path) -> list[Path]:
    """Write the checkpoint into `folder` and return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config()
    documents = {
        "config.json": config,
        "generation_config.json": generation_config(),
        "tokenizer.json": make_tokenizer(),
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, content in documents.items():
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    save_file(make_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    return [*(folder / name for name in documents), folder / "README.md", folder / "model.safetensors"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the bundled demo checkpoint.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: model/demo/)")
    for path in make(parser.parse_args().folder):
        print(f"{path} {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
